"""Survival measures: Kaplan–Meier, log-rank, Harrell's C, time-dependent AUC, Brier score.

`time` is that of the event, or of the last visit of a censored patient; `event` is 1 where it happened. Of a censoring
and an event at the same time the event counts as earlier. The measures that weight by the inverse probability of
censoring estimate that with Kaplan–Meier on a `reference`, the (time, event) of the training part; without one, on the
cases themselves.

Kaplan–Meier and log-rank are a few lines here, and lifelines' values in the tests: it caps pandas below 3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy import stats

from pathme_jax.evaluation.intervals import bootstrap_weights, interval, permutation_p

Reference = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass
class Curve:
    """A Kaplan–Meier estimate at the distinct times.

    Attributes:
        times: (t,) increasing.
        survival: (t,) share without an event up to and including each time.
        low, high: (t,) 95 % interval, Greenwood's variance on the log(-log) scale.
        at_risk, events: (t,) patients still followed just before, and events at, each time.
    """

    times: np.ndarray
    survival: np.ndarray
    low: np.ndarray
    high: np.ndarray
    at_risk: np.ndarray
    events: np.ndarray

    def at(self, when: np.ndarray) -> np.ndarray:
        """Survival at any times: right-continuous, 1 before the first, NaN past the last unless it is 0 there."""
        when = np.asarray(when, float)
        steps = np.append(1.0, self.survival)
        found = steps[np.searchsorted(self.times, when, side="right")]
        return np.where((when > self.times[-1]) & (self.survival[-1] > 0), np.nan, found)


def kaplan_meier(time: np.ndarray, event: np.ndarray) -> Curve:
    """S(t) = product over times s <= t of 1 - d_s / n_s (Kaplan & Meier 1958), from (n,) times and events."""
    times, inverse = np.unique(time, return_inverse=True)
    events = np.bincount(inverse, np.asarray(event) > 0)
    at_risk = len(inverse) - np.cumsum(np.bincount(inverse)) + np.bincount(inverse)
    survival = np.cumprod(1 - events / at_risk)
    with np.errstate(divide="ignore", invalid="ignore"):
        greenwood = np.cumsum(events / (at_risk * (at_risk - events)))
        spread = stats.norm.ppf(0.975) * np.sqrt(greenwood) / np.log(survival)
        low, high = survival ** np.exp(-spread), survival ** np.exp(spread)
    # No interval before the first event, or where nobody is left: the estimate stands alone.
    known = (survival > 0) & (survival < 1)
    low, high = np.where(known, low, survival), np.where(known, high, survival)
    return Curve(times, survival, low, high, at_risk, events)


def logrank(time: np.ndarray, event: np.ndarray, group: np.ndarray) -> tuple[float, float]:
    """Log-rank test that all groups share one hazard (Mantel 1966): (chi-squared, p), groups - 1 degrees.

    Args:
        time, event: (n,); group: (n,) any labels.

    At each event time the events of the groups are hypergeometric given their sum, so ties need no other rule.
    """
    names, of = np.unique(group, return_inverse=True)
    if len(names) < 2:
        return float("nan"), float("nan")
    happened = np.asarray(event) > 0
    times = np.unique(time[happened])
    member = np.eye(len(names))[of]
    at_risk = (time >= times[:, None]).astype(float) @ member  # (t, g)
    events = ((time == times[:, None]) & happened).astype(float) @ member
    n, d = at_risk.sum(1), events.sum(1)
    share = at_risk / n[:, None]
    excess = (events - d[:, None] * share).sum(0)[1:]
    scale = d * (n - d) / np.maximum(n - 1, 1)
    spread = np.diag(scale @ share) - (scale[:, None] * share).T @ share
    chi2 = float(excess @ np.linalg.pinv(spread[1:, 1:]) @ excess)
    return chi2, float(stats.chi2.sf(chi2, len(names) - 1))


def concordance(
    risk: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    groups: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> np.ndarray | float:
    """Harrell's C: of the pairs whose order is known, the share where the earlier event has the higher risk.

    A pair is comparable if the earlier one had the event, or both times are equal and just one had it; equal risks
    count half. Pairs of different `groups` (folds: scores of different models) are not compared.

    Args:
        risk, time, event, groups: (n,).
        weights: (r, n), how often each row is in each of r resamples; the answer is then (r,).

    Returns:
        C, NaN where there is no pair to compare.
    """
    happened = np.asarray(event) > 0
    first = (time[:, None] < time) | ((time[:, None] == time) & ~happened)
    pairs = first & happened[:, None]
    if groups is not None:
        pairs &= np.asarray(groups)[:, None] == groups
    right = pairs * ((risk[:, None] > risk) + 0.5 * (risk[:, None] == risk))
    if not np.isfinite(risk).all():
        return float("nan") if weights is None else np.full(len(weights), np.nan)
    w = np.ones((1, len(risk))) if weights is None else np.asarray(weights, float)
    total = ((w @ pairs) * w).sum(1)
    found = np.where(total > 0, ((w @ right) * w).sum(1) / np.maximum(total, 1e-12), np.nan)
    return float(found[0]) if weights is None else found


def dynamic_auc(
    risk: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    at: np.ndarray,
    reference: Reference | None = None,
) -> tuple[np.ndarray, float]:
    """Cumulative/dynamic AUC at the times `at` (Uno 2007), and their mean.

    At t, those with an event up to t against those still followed after t, each event weighted by 1 / G(its time),
    G the probability of being uncensored; equal risks count half. The mean weighs each time by the fall of the
    Kaplan–Meier curve up to it (Lambert & Chevret 2016).

    Args:
        risk: (n,), or (n, t) where it changes with time; at: (t,) increasing.

    Returns:
        (t,) values, NaN where one side is empty or its weights unknown; their mean, NaN if any is.
    """
    at = np.atleast_1d(np.asarray(at, float))
    risk = np.broadcast_to(np.asarray(risk, float).reshape(len(time), -1), (len(time), len(at)))
    happened = np.asarray(event) > 0
    with np.errstate(divide="ignore"):
        inverse = np.where(happened, 1 / _uncensored(reference or (time, event), time), 0.0)
    values = np.full(len(at), np.nan)
    for i, t in enumerate(at):
        case, control = happened & (time <= t), time > t
        ours, theirs, weight = risk[case, i], risk[control, i], inverse[case]
        if len(ours) and len(theirs) and np.isfinite(weight).all():
            wins = (ours[:, None] > theirs).mean(1) + 0.5 * (ours[:, None] == theirs).mean(1)
            values[i] = weight @ wins / weight.sum()
    survived = kaplan_meier(time, event).at(at)
    falls = -np.diff(np.append(1.0, survived))
    if len(at) == 1 or falls.sum() <= 0:
        return values, float(values.mean())
    return values, float(falls @ values / falls.sum())


def brier(
    survival: np.ndarray,
    time: np.ndarray,
    event: np.ndarray,
    at: np.ndarray,
    reference: Reference | None = None,
) -> tuple[np.ndarray, float]:
    """Brier score of predicted survival at the times `at` (Graf 1999), and its integral.

        BS(t) = mean of S(t)^2 [event by t] / G(its time) + (1 - S(t))^2 [followed past t] / G(t)

    Args:
        survival: (n, t) predicted probability of no event up to each time; at: (t,) increasing.

    Returns:
        (t,) scores, NaN where G is 0 or unknown; their mean over [at[0], at[-1]] by trapezoids, NaN for one time.
    """
    at = np.atleast_1d(np.asarray(at, float))
    reference = reference or (time, event)
    happened = np.asarray(event) > 0
    early = happened[:, None] & (time[:, None] <= at)
    late = time[:, None] > at
    with np.errstate(divide="ignore", invalid="ignore"):
        own, then = 1 / _uncensored(reference, time)[:, None], 1 / _uncensored(reference, at)
    error = np.where(early, survival**2 * own, 0) + np.where(late, (1 - survival) ** 2 * then, 0)
    scores = error.mean(0)
    scores[~np.isfinite(scores)] = np.nan
    whole = np.trapezoid(scores, at) / (at[-1] - at[0]) if len(at) > 1 else np.nan
    return scores, float(whole)


def _uncensored(reference: Reference, when: np.ndarray) -> np.ndarray:
    """G: Kaplan–Meier of being censored; events at the same time leave the risk set first."""
    time, event = reference
    happened = np.asarray(event) > 0
    times, inverse = np.unique(time, return_inverse=True)
    followed = len(inverse) - np.cumsum(np.bincount(inverse)) + np.bincount(inverse)
    at_risk = followed - np.bincount(inverse, happened)
    lost = np.bincount(inverse, ~happened)
    steps = np.append(1.0, np.cumprod(1 - lost / np.maximum(at_risk, 1)))
    found = steps[np.searchsorted(times, when, side="right")]
    return np.where((np.asarray(when) > times[-1]) & (steps[-1] > 0), np.nan, found)


def at_times(survival: np.ndarray, edges: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(n, b) survival at the ends of the bins to (n, t) at any times, linear in between (Kvamme & Borgan 2021).

    Args:
        edges: (b + 1,) of the bins, see `records.survival.quantile_edges`; past the last the value stays.
    """
    whole = np.concatenate([np.ones((len(survival), 1)), survival], axis=1)
    return np.array([np.interp(at, edges, row) for row in whole])


@dataclasses.dataclass
class OutOfFold:
    """Risks of cases by models that did not train on them; a row is one (fold, case).

    Attributes:
        risk: (n,) the higher, the sooner.
        time: (n,) months; event: (n,) 1 if it happened.
        folds: (n,) int, which model; cases: (n,) text.
        survival, at: (n, t) predicted survival at (t,) months; None for a Cox head.
    """

    risk: np.ndarray
    time: np.ndarray
    event: np.ndarray
    folds: np.ndarray
    cases: np.ndarray
    survival: np.ndarray | None = None
    at: np.ndarray | None = None


def measures(found: OutOfFold, seed: int = 0, draws: int = 1000) -> dict[str, Any]:
    """C within folds with its interval over patients and permutation p, C pooled and per fold, log-rank of the two
    halves by risk (each fold's own median, so that folds of different scale mix), AUC and Brier score over time."""
    time, event, folds = found.time, found.event, found.folds
    weights = bootstrap_weights(found.cases, event, draws, seed)
    per_fold = [
        float(concordance(found.risk[m], time[m], event[m]))
        for m in (folds == f for f in np.unique(folds))
    ]
    high, rank = np.zeros(len(time), bool), np.zeros(len(time))
    for f in np.unique(folds):
        mine = folds == f
        high[mine] = found.risk[mine] > np.median(found.risk[mine])
        rank[mine] = stats.rankdata(found.risk[mine]) / (mine.sum() + 1)
    chi2, p = logrank(time, event, high)
    known = [value for value in per_fold if np.isfinite(value)]
    result = {
        "c_index": concordance(found.risk, time, event, folds),
        "interval": interval(np.asarray(concordance(found.risk, time, event, folds, weights))),
        "permutation_p": permutation_p(
            lambda y: float(concordance(found.risk, y[:, 0], y[:, 1], folds)),
            np.stack([time, event], 1),
            found.cases,
            draws=draws,
            seed=seed,
        ),
        "pooled_c_index": concordance(found.risk, time, event),
        "fold_c_index": per_fold,
        "fold_mean": float(np.mean(known)) if known else np.nan,
        "fold_std": float(np.std(known)) if known else np.nan,
        "logrank_chi2": chi2,
        "logrank_p": p,
        "cases": len(np.unique(found.cases)),
        "events": len(np.unique(found.cases[np.asarray(event) > 0])),
    }
    at = _quartiles(time, event) if found.at is None else found.at
    auc, mean_auc = dynamic_auc(rank, time, event, at)
    result |= {"auc_months": at, "auc": auc, "mean_auc": mean_auc}
    if found.survival is not None:
        scores, integral = brier(found.survival, time, event, at)
        result |= {"brier": scores, "integrated_brier": integral}
    return result


def _quartiles(time: np.ndarray, event: np.ndarray) -> np.ndarray:
    happened = time[np.asarray(event) > 0]
    return np.unique(np.quantile(happened, [0.25, 0.5, 0.75])) if len(happened) else np.array([])
