"""Measures of classifiers, of several labels at once, and of regressions, over any number of resamples.

Every function takes `weights` (r, n), how often each of n rows is in each of r resamples (see
`evaluation.intervals`), or None for each once; it returns (r,) values, (1,) without weights. The definitions are
scikit-learn's, which the tests hold them to; its own functions would take one call a draw.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pathme_jax.evaluation.auroc import weighted_auroc
from pathme_jax.evaluation.calibration import expected_calibration_error
from pathme_jax.evaluation.intervals import interval

Weights = np.ndarray | None


def confusion(
    predicted: np.ndarray, labels: np.ndarray, classes: int, weights: Weights = None
) -> np.ndarray:
    """(r, c, c) counts, row the true class, column the predicted one; both (n,) int."""
    cell = np.eye(classes * classes)[labels * classes + predicted]
    return (_weights(weights, len(labels)) @ cell).reshape(-1, classes, classes)


def accuracy(table: np.ndarray) -> np.ndarray:
    return _ratio(_diagonal(table).sum(1), table.sum((1, 2)))


def balanced_accuracy(table: np.ndarray) -> np.ndarray:
    """Mean recall of the classes present."""
    return _mean_known(_ratio(_diagonal(table), table.sum(2)))


def f1(table: np.ndarray, weighted: bool = False) -> np.ndarray:
    """2 tp / (2 tp + fp + fn), mean over the classes present or predicted, or weighted by their size."""
    each = _ratio(2 * _diagonal(table), table.sum(1) + table.sum(2))
    if weighted:
        return _ratio((np.nan_to_num(each) * table.sum(2)).sum(1), table.sum((1, 2)))
    return _mean_known(each)


def kappa(table: np.ndarray, power: int = 0) -> np.ndarray:
    """Cohen's kappa: 1 - observed / chance disagreement; disagreement |i - j|^power (0: all alike, 1, 2)."""
    i = np.arange(table.shape[1])
    cost = np.abs(i[:, None] - i) ** power if power else (i[:, None] != i).astype(float)
    chance = table.sum(2)[:, :, None] * table.sum(1)[:, None] / table.sum((1, 2))[:, None, None]
    return 1 - _ratio((cost * table).sum((1, 2)), (cost * chance).sum((1, 2)))


def average_precision(
    score: np.ndarray, positive: np.ndarray, weights: Weights = None
) -> np.ndarray:
    """Area under precision over recall, by steps: sum of (R_k - R_k-1) P_k over the distinct scores.

    score: (n,); positive: (n,) bool. NaN without a positive.
    """
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))  # of the rows of equal score
    w = _weights(weights, len(score))[:, order]
    hits, all_ = np.cumsum(w * positive[order], 1)[:, last], np.cumsum(w, 1)[:, last]
    precision = hits / np.maximum(all_, 1e-12)
    gained = np.diff(hits, axis=1, prepend=0)
    return _ratio((gained * precision).sum(1), hits[:, -1])


def brier(scores: np.ndarray, labels: np.ndarray, weights: Weights = None) -> np.ndarray:
    """Mean squared error of (n, c) probabilities: of the positive class for two classes, else summed (Brier 1950)."""
    error = (scores - np.eye(scores.shape[1])[labels]) ** 2
    return _mean(error[:, 1] if scores.shape[1] == 2 else error.sum(1), weights)


def classification(
    scores: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray | None = None,
    weights: Weights = None,
    *,
    probabilities: bool = True,
) -> dict[str, np.ndarray]:
    """All measures of (n, c) scores, the greatest being the prediction, and (n,) int labels.

    AUROC compares rows of one fold only (see `evaluation.auroc`); AUPRC is that of class 1 for two classes, else the
    mean over the classes present, all rows together.

    Args:
        probabilities: the scores are; else the Brier score and calibration error are left out.
    """
    classes = scores.shape[1]
    table = confusion(scores.argmax(1), labels, classes, weights)
    compared = [1] if classes == 2 else range(classes)
    precision = [average_precision(scores[:, c], labels == c, weights) for c in compared]
    found = {
        "auroc": weighted_auroc(scores, labels, folds, weights),
        "auprc": _mean_known(np.stack(precision, 1)),
        "accuracy": accuracy(table),
        "balanced_accuracy": balanced_accuracy(table),
        "f1_macro": f1(table),
        "f1_weighted": f1(table, weighted=True),
        "kappa": kappa(table),
        "kappa_linear": kappa(table, 1),
        "kappa_quadratic": kappa(table, 2),
    }
    if probabilities:
        found["brier"] = brier(scores, labels, weights)
        for bins in ("width", "mass"):
            found[f"ece_{bins}"] = expected_calibration_error(scores, labels, bins, weights=weights)
    return found


def per_class(
    scores: np.ndarray, labels: np.ndarray, folds: np.ndarray | None = None
) -> dict[str, list[float]]:
    """AUROC and AUPRC of each class against the rest, NaN for one that is absent."""
    found: dict[str, list[float]] = {"auroc": [], "auprc": []}
    for c in range(scores.shape[1]):
        against = np.stack([-scores[:, c], scores[:, c]], 1)
        positive = labels == c
        found["auroc"].append(float(weighted_auroc(against, positive.astype(int), folds, None)[0]))
        found["auprc"].append(float(average_precision(scores[:, c], positive)[0]))
    return found


def multilabel(
    scores: np.ndarray, labels: np.ndarray, folds: np.ndarray | None = None, weights: Weights = None
) -> dict[str, np.ndarray]:
    """Means over the labels of each label's measures as two classes.

    Args:
        scores: (n, l) probabilities; labels: (n, l) 0, 1, or negative where unknown: that row counts not for it.
    """
    each = []
    for score, label in zip(scores.T, labels.T, strict=True):
        known = label >= 0
        if not known.any():
            continue
        each.append(
            classification(
                np.stack([1 - score, score], 1)[known],
                label[known].astype(int),
                None if folds is None else folds[known],
                None if weights is None else weights[:, known],
            )
        )
    return {name: _mean_known(np.stack([one[name] for one in each], 1)) for name in each[0]}


def regression(
    predicted: np.ndarray, truth: np.ndarray, weights: Weights = None
) -> dict[str, np.ndarray]:
    """R2, Pearson's r and the mean absolute error of (n,) predictions; R2 and r NaN where the truth is constant."""
    x, y = np.asarray(predicted, float), np.asarray(truth, float)
    dx, dy = x - _mean(x, weights)[:, None], y - _mean(y, weights)[:, None]
    w = _weights(weights, len(x))
    sxx, syy, sxy = ((w * a * b).sum(1) for a, b in ((dx, dx), (dy, dy), (dx, dy)))
    return {
        "r2": 1 - _ratio((w * (y - x) ** 2).sum(1), syy),
        "pearson": _ratio(sxy, np.sqrt(sxx * syy)),
        "mae": _mean(np.abs(x - y), weights),
    }


def with_intervals(
    measure: Callable[[np.ndarray | None], dict[str, np.ndarray]], weights: np.ndarray
) -> dict[str, dict[str, float | tuple[float, float]]]:
    """Name to value and bootstrap interval: `measure` takes weights or None, as `classification` does."""
    values, drawn = measure(None), measure(weights)
    return {
        name: {"value": float(values[name][0]), "interval": interval(drawn[name])}
        for name in values
    }


def _weights(weights: Weights, rows: int) -> np.ndarray:
    return np.ones((1, rows)) if weights is None else np.asarray(weights, float)


def _mean(values: np.ndarray, weights: Weights) -> np.ndarray:
    w = _weights(weights, len(values))
    return w @ values / w.sum(1)


def _diagonal(table: np.ndarray) -> np.ndarray:
    return np.diagonal(table, axis1=1, axis2=2)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)


def _mean_known(values: np.ndarray) -> np.ndarray:
    """(r, c) means over the finite values of each row, NaN without any."""
    known = np.isfinite(values)
    return _ratio(np.where(known, values, 0).sum(1), known.sum(1))
