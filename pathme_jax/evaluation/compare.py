"""Two models on the same patients and folds: is one better, or was it luck?

The scores of both are rows of one table, so that every draw takes the same patients for both: patients who are hard are
hard for either, and the difference is surer than the two intervals suggest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from pathme_jax.errors import UserError
from pathme_jax.evaluation.auroc import weighted_auroc
from pathme_jax.evaluation.classification import OutOfFold
from pathme_jax.evaluation.intervals import bootstrap_weights, interval


def paired_bootstrap(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """95 % interval of second - first and its two-sided p, from (r,) values of the same r draws.

    p is twice the share of draws on the rarer side of zero, one added to both counts.
    """
    gained = np.asarray(second) - np.asarray(first)
    gained = gained[np.isfinite(gained)]
    if not len(gained):
        return {"interval": (np.nan, np.nan), "p": np.nan}
    rarer = min(np.sum(gained <= 0), np.sum(gained >= 0))
    return {"interval": interval(gained), "p": float(min(1.0, 2 * (1 + rarer) / (1 + len(gained))))}


def permutation_p(
    measure: Callable[[np.ndarray], float],
    first: np.ndarray,
    second: np.ndarray,
    cases: np.ndarray,
    folds: np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> float:
    """Two-sided p that it does not matter which model a patient's scores are from: they are exchanged at random.

    Scores are first replaced by their ranks within the fold, lest models of different scale be mixed (Venkatraman
    & Begg 1996); `measure`, (n, c) scores to a value, should depend on ranks alone, as AUROC does.
    """
    a, b = _ranks(first, folds), _ranks(second, folds)
    _, unit = np.unique(cases, return_inverse=True)
    rng = np.random.default_rng([seed, 8])
    true = abs(measure(b) - measure(a))
    if not np.isfinite(true):
        return float("nan")
    hits = 0
    for _ in range(draws):
        swap = rng.integers(0, 2, unit.max() + 1)[unit].astype(bool)[:, None]
        hits += abs(measure(np.where(swap, a, b)) - measure(np.where(swap, b, a))) >= true - 1e-12
    return float((1 + hits) / (1 + draws))


def delong(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, folds: np.ndarray
) -> dict[str, Any]:
    """AUROCs of two scores, their difference and its two-sided p (DeLong 1988, by midranks as in Sun & Xu 2014).

    Within folds as `evaluation.auroc`: folds are independent patients, so their variances add, each fold weighing its
    share of the pairs.

    Args:
        first, second: (n,) scores of class 1; labels: (n,) 0 or 1; folds: (n,). One row a patient.
    """
    values, spread, total = np.zeros(2), np.zeros((2, 2)), 0
    scores = np.stack([first, second])
    for fold in np.unique(folds):
        positive = scores[:, (folds == fold) & (labels == 1)]
        negative = scores[:, (folds == fold) & (labels == 0)]
        m, n = positive.shape[1], negative.shape[1]
        if not m * n:
            continue
        both = np.concatenate([positive, negative], 1)
        rank, own, other = (stats.rankdata(x, axis=1) for x in (both, positive, negative))
        above = (rank[:, :m] - own) / n  # share of the negatives below each positive
        below = 1 - (rank[:, m:] - other) / m
        values += m * n * above.mean(1)
        total += m * n
        for parts, k in ((above, m), (below, n)):
            if k > 1:
                spread += (m * n) ** 2 * np.cov(parts) / k
    if not total:
        return {"first": np.nan, "second": np.nan, "difference": np.nan, "p": np.nan}
    values, spread = values / total, spread / total**2
    gained = float(values[1] - values[0])
    variance = float(spread[0, 0] + spread[1, 1] - 2 * spread[0, 1])
    z = abs(gained) / np.sqrt(variance) if variance > 1e-15 else np.inf * abs(gained)
    p = 1.0 if gained == 0 else float(2 * stats.norm.sf(z))
    return {"first": float(values[0]), "second": float(values[1]), "difference": gained, "p": p}


def compare_auroc(
    first: OutOfFold, second: OutOfFold, *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The gain in AUROC of `second` over `first`, its interval over patients, and p by permutation (and DeLong).

    Raises:
        UserError: the two were not tested on the same patients in the same folds.
    """
    first, second = _aligned(first, second)
    labels, folds, cases = first.labels, first.folds, first.cases
    weights = bootstrap_weights(cases, labels, draws, seed)
    once, drawn = (
        [weighted_auroc(each.scores, labels, folds, w) for each in (first, second)]
        for w in (None, weights)
    )
    result = {
        "first": float(once[0][0]),
        "second": float(once[1][0]),
        "difference": float(once[1][0] - once[0][0]),
        "interval": paired_bootstrap(*drawn)["interval"],
        "bootstrap_p": paired_bootstrap(*drawn)["p"],
        "permutation_p": permutation_p(
            lambda scores: float(weighted_auroc(scores, labels, folds, None)[0]),
            *(first.scores, second.scores, cases, folds),
            draws=draws,
            seed=seed,
        ),
        "cases": len(np.unique(cases)),
    }
    if first.scores.shape[1] == 2 and len(np.unique(cases)) == len(cases):
        result["delong_p"] = delong(first.scores[:, 1], second.scores[:, 1], labels, folds)["p"]
    return result


def _aligned(first: OutOfFold, second: OutOfFold) -> tuple[OutOfFold, OutOfFold]:
    """Both with their rows in the order of fold and case."""
    sorted_ = []
    for each in (first, second):
        order = np.lexsort((each.cases, each.folds))
        sorted_.append(
            OutOfFold(each.scores[order], each.labels[order], each.folds[order], each.cases[order])
        )
    a, b = sorted_
    for name in ("folds", "cases", "labels"):
        if not np.array_equal(getattr(a, name), getattr(b, name)):
            raise UserError(
                f"the two models differ in the {name} they were tested on",
                "Compare runs on the same patients, labels and folds",
            )
    return a, b


def _ranks(scores: np.ndarray, folds: np.ndarray) -> np.ndarray:
    ranks = np.zeros(scores.shape)
    for fold in np.unique(folds):
        mine = folds == fold
        ranks[mine] = stats.rankdata(scores[mine], axis=0) / mine.sum()
    return ranks
