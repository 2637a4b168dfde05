"""AUROC of cross-validated scores, its interval over patients, and its permutation test.

Scores of different folds come from different models, so only cases of one fold are compared: of all pairs of a
positive and a negative case tested in the same fold, the share ordered rightly, ties counting half. This is the
mean of the folds' AUROCs weighted by their pairs, and 0.5 for scores without information. Pooling all folds
first is not: a case held out shifts the training set away from itself, and the pooled value falls below 0.5.

Rows are (fold, case). All functions take scores (n, c), labels (n,) int and groups (n,), the fold of each row;
with c > 2 they average one class against the rest over the classes present (macro).
"""

from __future__ import annotations

import numpy as np

from pathme_jax.evaluation.intervals import bootstrap_weights, interval


def auroc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> float:
    """Within-group AUROC, or the plain one without groups. NaN where there is no pair to compare."""
    return float(_macro(scores, _one_hot(scores, labels), _groups(labels, groups), None)[0])


def weighted_auroc(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, weights: np.ndarray | None
) -> np.ndarray:
    """(r,) AUROCs of resamples, `weights` (r, n) saying how often each row is in each; None: (1,), each once."""
    return _macro(scores, _one_hot(scores, labels), _groups(labels, groups), weights)


def bootstrap_interval(
    scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    cases: np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval, drawing patients with replacement within each class.

    Args:
        cases: (n,) the patient of each row: all rows of a patient are drawn together.
    """
    weights = bootstrap_weights(cases, labels, draws, seed)
    return interval(weighted_auroc(scores, labels, groups, weights))


def permutation_p(
    scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None,
    cases: np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> float:
    """One-sided p: how often labels shuffled over the patients score as high as the true ones."""
    rng = np.random.default_rng([seed, 6])
    _, first, unit = np.unique(cases, return_index=True, return_inverse=True)
    shuffled = rng.permuted(np.tile(labels[first], (draws, 1)), axis=1)[:, unit]
    true = auroc(scores, labels, groups)
    if not np.isfinite(true):
        return float("nan")
    values = _macro(scores, _one_hot(scores, shuffled), _groups(labels, groups), None)
    hits = np.sum(values >= true - 1e-12)
    return float((1 + hits) / (1 + draws))


def roc(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, points: int = 501
) -> tuple[np.ndarray, np.ndarray]:
    """Mean ROC curve, (points,) false and true positive rate; the area under it is `auroc`.

    The folds' curves are averaged at equal false positive rate, weighted by their pairs; classes evenly.
    """
    x = np.linspace(0, 1, points)
    curves = []
    for c in _compared(scores):
        curve, pairs = np.zeros(points), 0
        for group in np.unique(groups):
            mine = groups == group
            positive, score = labels[mine] == c, scores[mine, c]
            n = int(positive.sum() * (~positive).sum())
            if n:
                cuts = np.unique(score)[::-1]
                hit = np.mean(score[positive][:, None] >= cuts, axis=0)
                false = np.mean(score[~positive][:, None] >= cuts, axis=0)
                curve += n * np.interp(x, np.append(0, false), np.append(0, hit))
                pairs += n
        if pairs:
            curves.append(curve / pairs)
    return x, np.mean(curves, axis=0) if curves else np.full(points, np.nan)


def _compared(scores: np.ndarray) -> list[int]:
    return [1] if scores.shape[1] == 2 else list(range(scores.shape[1]))


def _groups(labels: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    return np.zeros(len(labels), int) if groups is None else np.asarray(groups)


def _one_hot(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """labels (..., n) → (c, ..., n) of 0 and 1."""
    return np.array([labels == c for c in range(scores.shape[1])], float)


def _macro(
    scores: np.ndarray, is_class: np.ndarray, groups: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """(r,) AUROCs of r sets of labels (c, r, n) or of weights (r, n): the U statistic."""
    if not np.isfinite(scores).all():  # sorted, they would have the order of the rows
        sets = len(np.atleast_2d(is_class[0])) if weights is None else len(weights)
        return np.full(sets, np.nan)
    values = []
    for c in _compared(scores):
        positive = np.atleast_2d(is_class[c])
        negative = 1 - positive
        if weights is not None:
            positive, negative = positive * weights, negative * weights
        wins, pairs = 0.0, 0.0
        for group in np.unique(groups):
            mine = np.flatnonzero(groups == group)
            order = mine[np.argsort(scores[mine, c], kind="stable")]
            starts = np.flatnonzero(
                np.append(True, np.diff(scores[order, c]) != 0)
            )  # of equal scores
            p, n = (np.add.reduceat(each[:, order], starts, 1) for each in (positive, negative))
            wins = wins + (p * (np.cumsum(n, 1) - n / 2)).sum(1)
            pairs = pairs + positive[:, mine].sum(1) * negative[:, mine].sum(1)
        values.append(np.where(pairs > 0, wins / np.maximum(pairs, 1e-12), np.nan))
    stacked = np.array(values)
    known = np.isfinite(stacked)
    return np.where(
        known.any(0), np.where(known, stacked, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan
    )
