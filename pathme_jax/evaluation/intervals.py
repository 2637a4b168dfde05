"""Intervals and permutation tests over patients, for any measure.

A measure takes `weights` (r, n), how often each of n rows is in each of r resamples, and returns (r,) values: the
1,000 draws of a bootstrap are matrix products rather than a loop.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def bootstrap_weights(
    cases: np.ndarray, strata: np.ndarray, draws: int = 1000, seed: int = 0
) -> np.ndarray:
    """(draws, n) how often each row is drawn: patients with replacement, within each stratum.

    Args:
        cases: (n,) the patient of each row: all rows of a patient are drawn together.
        strata: (n,) class (or event): every draw has as many patients of each; a patient's is its first row's.
    """
    rng = np.random.default_rng([seed, 5])
    names, first, unit = np.unique(cases, return_index=True, return_inverse=True)
    weights = np.zeros((draws, len(names)))
    for stratum in np.unique(np.asarray(strata)[first]):
        mine = np.flatnonzero(np.asarray(strata)[first] == stratum)
        even = np.full(len(mine), 1 / len(mine))
        weights[:, mine] = rng.multinomial(len(mine), even, size=draws)
    return weights[:, unit]


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of (r,) bootstrap values, those that are not a number left out; NaN if all are."""
    values = np.asarray(values)[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def permutation_p(
    measure: Callable[[np.ndarray], float],
    labels: np.ndarray,
    cases: np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> float:
    """One-sided p: how often labels shuffled over the patients measure as high as the true ones.

    Args:
        measure: (n, ...) labels to a value, higher being better.
        labels: (n, ...) one for each row, the same in all rows of a patient; cases: (n,).
    """
    rng = np.random.default_rng([seed, 6])
    _, first, unit = np.unique(cases, return_index=True, return_inverse=True)
    true = measure(labels)
    if not np.isfinite(true):
        return float("nan")
    found = [measure(labels[first][rng.permutation(len(first))][unit]) for _ in range(draws)]
    return float((1 + np.sum(np.array(found) >= true - 1e-12)) / (1 + draws))
