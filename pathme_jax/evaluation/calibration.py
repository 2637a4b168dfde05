"""Do probabilities say how often they are right? Reliability curves and the expected calibration error."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Reliability:
    """One point for each bin with rows in it.

    Attributes:
        confidence: (b,) mean stated probability; frequency: (b,) how often it was so; count: (b,) rows.
    """

    confidence: np.ndarray
    frequency: np.ndarray
    count: np.ndarray


def reliability(
    scores: np.ndarray, labels: np.ndarray, bins: str = "width", number: int = 10
) -> Reliability:
    """Stated against observed probability: of class 1 for two classes, else of the predicted class.

    Args:
        scores: (n, c) probabilities; labels: (n,) int.
        bins: "width", equal parts of [0, 1]; "mass", as many rows in each (equal probabilities stay together).
    """
    stated, true = _stated(scores, labels)
    of = _bin(stated, bins, number)
    count = np.bincount(of, minlength=number)
    kept = count > 0
    return Reliability(
        np.bincount(of, stated, number)[kept] / count[kept],
        np.bincount(of, true, number)[kept] / count[kept],
        count[kept],
    )


def expected_calibration_error(
    scores: np.ndarray,
    labels: np.ndarray,
    bins: str = "width",
    number: int = 10,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """sum over bins of n_b / n |frequency - confidence| (Naeini 2015), of the probabilities `reliability` looks at.

    Args:
        weights: (r, n) of r resamples, or None; the bins are those of all rows, each once. A resample's bins
            scatter around the sample's, so that the interval lies above the value where calibration is good.

    Returns:
        (r,), or (1,) without weights.
    """
    stated, true = _stated(scores, labels)
    w = np.ones((1, len(stated))) if weights is None else weights
    member = np.eye(number)[_bin(stated, bins, number)]
    gap = np.abs((w * (true - stated)) @ member)
    return gap.sum(1) / w.sum(1)


def _stated(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) probability, and 1 where what it speaks of is so."""
    if scores.shape[1] == 2:
        return scores[:, 1].astype(float), (labels == 1).astype(float)
    return scores.max(1).astype(float), (scores.argmax(1) == labels).astype(float)


def _bin(stated: np.ndarray, bins: str, number: int) -> np.ndarray:
    inner = np.arange(1, number) / number
    edges = {"width": lambda: inner, "mass": lambda: np.quantile(stated, inner)}[bins]()
    return np.searchsorted(edges, stated, side="left")
