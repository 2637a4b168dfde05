"""Who is trained and tested on what, towards which truth, with what weight; and the controls dealt from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.mil import folds, sweep
from pathme_jax.mil.bags import MilBag
from pathme_jax.mil.outcomes import Outcome
from pathme_jax.mil.settings import Settings
from pathme_jax.mil.table import Table

DEALS = 50  # of a control, until every fold can learn from it


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who is trained and tested on what: p rows, those of the folds with the true labels first, then those of each
    control, whose truth was dealt to other patients.

    Attributes:
        parts: (p, n). truth: of each task (p, n, w). weights: (p, n, tasks). names: of the k folds; the true labels
            and each control have a row of each. skipped: folds that were left out, with the reason.
    """

    parts: np.ndarray
    truth: list[np.ndarray]
    weights: np.ndarray
    names: list[str]
    skipped: list[str]

    @property
    def folds(self) -> int:
        return len(self.names)


def make_plan(bags: list[MilBag], table: Table, settings: Settings) -> Plan:
    """Folds by patient, stratified by the first task; the user's own where the table has some.

    Raises:
        UserError: as `folds`; a fold that knows nothing of a task.
    """
    cases, rows = [bag.case_id for bag in bags], [bag.row for bag in bags]
    true = [truth[rows] for truth in table.truth]
    if settings.bag == "case":  # what any of its slides knows
        _, unit = np.unique(table.case_ids, return_inverse=True)
        true = [of_cases(truth, unit)[unit][rows] for truth in table.truth]

    def split(truth: list[np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
        first = table.outcomes[0]
        if table.folds:
            return folds.given(table, rows, lambda train: first.lacks(truth[0][train]))
        _, unit = np.unique(cases, return_inverse=True)
        strata, names = first.strata(of_cases(truth[0], unit))  # patients, not slides, are counted
        parts = folds.stratified(cases, strata[unit], names, settings.folds, settings.seed)
        return {f"fold {i}": part for i, part in enumerate(parts)}, []

    parts, skipped = split(true)
    for name, part in parts.items():
        unknown = _unknown(table.outcomes, part, true)
        if unknown:
            raise UserError(
                f"{name} has no slide to learn {unknown} from", "Use fewer tasks, or other folds"
            )
        targets_of(table.outcomes, part, true, cases)
    if settings.sweep:
        sweep.check(parts, true)
    each = [(part, true) for part in parts.values()]
    for i in range(settings.shuffles):
        each += _control(table, cases, true, list(parts.values()), split, [settings.seed, 7, i])
    return Plan(
        np.array([part for part, _ in each]),
        [np.array([truth[t] for _, truth in each]) for t in range(len(true))],
        np.array([_weights(table.outcomes, part, truth, cases) for part, truth in each]),
        list(parts),
        skipped,
    )


def _control(
    table: Table,
    cases: list[str],
    true: list[np.ndarray],
    parts: list[np.ndarray],
    split: Callable[[list[np.ndarray]], tuple[dict[str, np.ndarray], list[str]]],
    seed: list[int],
) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Of each fold its part, and a truth dealt to other patients, dealt again where a fold could not learn from it.

    Raises:
        UserError: no dealing can be learned from.
    """
    for deal in range(DEALS):
        other = permuted(cases, true, [*seed, deal] if deal else seed)
        # As balanced as the true folds are, unless those are the user's.
        own = parts if table.folds else list(split(other)[0].values())
        if all(_can_learn(table.outcomes, part, other, cases) for part in own):
            return [(part, other) for part in own]
    raise UserError(
        f"in {DEALS} dealings of the truth to other patients some fold had nothing to learn from",
        "Pass --shuffles 0, or give folds with more training patients",
    )


def _unknown(outcomes: Sequence[Outcome], part: np.ndarray, truth: list[np.ndarray]) -> str:
    """The first task of which the training part knows nothing, or ""."""
    for outcome, of in zip(outcomes, truth, strict=True):
        if np.isnan(of[part == folds.TRAIN]).all():
            return outcome.task.name
    return ""


def _can_learn(
    outcomes: Sequence[Outcome], part: np.ndarray, truth: list[np.ndarray], cases: list[str]
) -> bool:
    if outcomes[0].lacks(truth[0][part == folds.TRAIN]) or _unknown(outcomes, part, truth):
        return False
    try:
        targets_of(outcomes, part, truth, cases)
    except UserError:
        return False
    return True


def targets_of(
    outcomes: Sequence[Outcome], part: np.ndarray, truth: list[np.ndarray], cases: list[str]
) -> np.ndarray:
    """(n, width of all tasks) what one member is trained towards.

    Raises:
        UserError: too few events for the bins of time.
    """
    each = [
        outcome.targets(once(part, of, cases), of)
        for outcome, of in zip(outcomes, truth, strict=True)
    ]
    return np.concatenate(each, -1)


def once(part: np.ndarray, truth: np.ndarray, cases: list[str]) -> np.ndarray:
    """(n,) parts with one bag of each training case that knows its truth (n, w); the others are unused.

    For what is counted by patients, however many slides they have: quantiles, means and deviations.
    """
    known = np.flatnonzero((part == folds.TRAIN) & ~np.isnan(truth).all(1))
    _, first = np.unique(np.asarray(cases)[known], return_index=True)
    found = np.where(part == folds.TRAIN, folds.UNUSED, part)
    found[known[first]] = folds.TRAIN
    return found


def _weights(
    outcomes: Sequence[Outcome], part: np.ndarray, truth: list[np.ndarray], cases: list[str]
) -> np.ndarray:
    """(n, tasks)"""
    groups = [outcome.balance(of) for outcome, of in zip(outcomes, truth, strict=True)]
    return np.stack([bag_weights(part, group, cases) for group in groups], 1)


def bag_weights(part: np.ndarray, groups: np.ndarray, cases: list[str]) -> np.ndarray:
    """(n,) weights of one member's bags: 0 off the training part and where the group is NaN, else every group
    weighs the same in sum, and every case of a group, however many slides it has; their mean over the training bags
    with a group is 1."""
    train = (part == folds.TRAIN) & ~np.isnan(groups)
    _, unit = np.unique(cases, return_inverse=True)
    weights = np.zeros(len(cases))
    for group in np.unique(groups[train]):
        mine = train & (groups == group)
        slides = np.bincount(unit, mine)[unit]
        own = np.where(mine, 1 / np.maximum(slides, 1), 0)
        weights += own / own.sum()
    return weights * train.sum() / max(weights.sum(), 1e-12)


def permuted(cases: list[str], truth: list[np.ndarray], seed: list[int]) -> list[np.ndarray]:
    """The truth of the cases, dealt to other cases; all bags of a case, and all tasks, go together."""
    _, unit = np.unique(cases, return_inverse=True)
    order = np.random.default_rng(seed).permutation(unit.max() + 1)
    return [of_cases(values, unit)[order][unit] for values in truth]


def of_cases(values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """(cases, w) of each case what the first of its bags that knows it says; values (n, w), unit (n,)."""
    found = np.full((unit.max() + 1, values.shape[1]), np.nan)
    for i in range(len(values))[::-1]:
        if not np.isnan(values[i]).all():
            found[unit[i]] = values[i]
    return found
