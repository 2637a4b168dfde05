"""When to say nothing, and how far to trust a number: learned from out-of-fold predictions, one a case."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Z = 1.959964  # of a two-sided 95 % interval


def least_confidence(confidence: np.ndarray, right: np.ndarray, accuracy: float) -> dict[str, Any]:
    """The least confidence at which what is at or above it is right in at least `accuracy` of the cases.

    It is chosen on the cases it is judged by, so `right` is somewhat flattered: `right_at_least` is the lower end of
    Wilson's 95 % interval.

    Args:
        confidence, right: (n,) of each case.

    Returns:
        threshold, None where no threshold reaches it; right, right_at_least, kept (share of all cases) at and above
        it, None without one; accuracy, cases.
    """
    found: dict[str, Any] = dict.fromkeys(("threshold", "right", "right_at_least", "kept"))
    found |= {"accuracy": accuracy, "cases": len(confidence)}
    for threshold in np.unique(confidence):
        above = confidence >= threshold
        share = right[above].mean()
        if share >= accuracy:
            low = wilson_low(int(right[above].sum()), int(above.sum()))
            found |= {"threshold": float(threshold), "right": float(share), "right_at_least": low}
            return found | {"kept": float(above.mean())}
    return found


def wilson_low(right: int, count: int) -> float:
    """Lower end of Wilson's 95 % interval of a share (Wilson 1927)."""
    share, z2 = right / count, Z**2
    middle = share + z2 / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, (middle - spread) / (1 + z2 / count))


def conformal_radius(residuals: np.ndarray, level: float) -> float | None:
    """Half the width of the interval that holds a new truth with probability `level` or more (split conformal).

    The ⌈(n + 1) level⌉-th smallest of the (n,) absolute residuals; None where n is too small for the level.
    """
    rank = math.ceil((len(residuals) + 1) * level - 1e-9)
    return float(np.sort(np.abs(residuals))[rank - 1]) if rank <= len(residuals) else None


def percentile(risk: np.ndarray, seen: dict[int, np.ndarray]) -> float:
    """Mean over the folds of the share of a fold model's out-of-fold risks that are at most its risk, in percent.

    Args:
        risk: (f,) of each fold's model: risks of different models have no common scale.
        seen: fold to (n,) risks.
    """
    return float(100 * np.mean([(values <= risk[fold]).mean() for fold, values in seen.items()]))
