"""Cross-validation of survival: the same population, other targets and measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.evaluation.linear_probe import cox_ridge
from pathme_jax.evaluation.survival import OutOfFold, measures
from pathme_jax.files import write_csv
from pathme_jax.mil import buckets, folds
from pathme_jax.mil.bags import Cohort, MilBag, make_bags
from pathme_jax.mil.crossval import FEW_CASES, answers, case_weights, fit_plan, permuted
from pathme_jax.mil.outputs import rounded, write_attention, write_history
from pathme_jax.mil.settings import Settings
from pathme_jax.mil.tasks import Task, Tasks
from pathme_jax.records.labels import Labels
from pathme_jax.records.survival import Survival, bin_of, quantile_edges

STATES = ["censored", "event"]
LOSSES = {"nll": "hazards", "cox": "cox"}
RISK_SET = 8  # bags a step, at least, where the step's bags are the risk set
PENALTY = 1.0  # of the linear baseline


def as_labels(table: Survival) -> Labels:
    """The table with the event as its label: what folds are stratified by."""
    return Labels(
        table.task or "survival",
        STATES,
        table.slide_ids,
        table.case_ids,
        np.asarray(table.event),
        table.folds,
        table.unlabelled,
        table.notes,
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who is trained and tested on what; rows of the true times, then those of each control.

    Attributes:
        parts, weights: (p, n). time, event: (p, n). folds: rows of each. skipped: folds left out.
    """

    parts: np.ndarray
    weights: np.ndarray
    time: np.ndarray
    event: np.ndarray
    folds: int
    skipped: list[str]


def evaluate(
    folder: Path, cohort: Cohort, table: Survival, settings: Settings, name: str
) -> dict[str, Any]:
    """Trains, predicts out of fold, writes everything but metrics.json, and returns that.

    Raises:
        UserError: settings that survival cannot use; too few events.
    """
    _check(settings)
    labels = as_labels(table)
    bags = make_bags(cohort.slides, labels, settings.bag)
    plan = _plan(bags, labels, table, settings)
    tasks = Tasks((Task(labels.task, LOSSES[settings.survival], bins=settings.time_bins),))
    fitted, packed = fit_plan(
        bags, tasks, plan.parts, _targets(plan, settings), plan.weights, settings, name
    )
    tested = np.argwhere(plan.parts == folds.TEST)
    scores, attention = answers(fitted, packed, tested, settings.seeds)
    k = plan.folds
    real = tested[:, 0] < k
    found = {
        "head": _by_case(tested[real], scores[real, 0], plan, bags),
        "mean_pool": _by_case(tested[real], _linear(bags, plan, tested[real]), plan, bags),
    }
    if settings.shuffles:
        found["shuffled"] = _by_case(tested[~real], scores[~real, 0], plan, bags)
    _write_cases(folder, found["head"])
    write_history(folder, fitted.history[: k * settings.seeds : settings.seeds])
    write_attention(
        folder, bags, tested[real], [a for a, r in zip(attention, real, strict=True) if r]
    )
    cases = {bag.case_id: bag.label for bag in bags}
    return rounded(
        {
            "task": labels.task,
            "survival": settings.survival,
            "cases": len(cases),
            "events": sum(cases.values()),
            "slides": len(cohort.slides),
            "instances": sum(len(bag.features) for bag in bags),
            "bag": settings.bag,
            "head": settings.head,
            "padding": buckets.waste(packed),
            "folds": k,
            "fold_source": ", ".join(table.folds) or "stratified by case and event",
            "folds_left_out": plan.skipped,
            "too_few_to_judge": sum(cases.values()) < FEW_CASES,
            "rows": {row: measures(each, settings.seed) for row, each in found.items()},
            "read": table.notes,
            "orphans": cohort.orphans,
            "problems": cohort.problems,
            "blank_label": table.unlabelled,
        }
    )


def _check(settings: Settings) -> None:
    if settings.survival not in LOSSES:
        raise UserError(f"--survival {settings.survival}", f"Expected one of {', '.join(LOSSES)}")
    if settings.survival == "cox" and settings.batch < RISK_SET:
        raise UserError(
            f"--batch {settings.batch} with --survival cox, whose risk set is the bags of a step",
            f"Give --batch {RISK_SET} or more, or --survival nll",
        )


def _plan(bags: list[MilBag], labels: Labels, table: Survival, settings: Settings) -> Plan:
    cases = [bag.case_id for bag in bags]
    rows = [bag.row for bag in bags]
    true = np.stack([np.asarray(table.time)[rows], np.asarray(table.event)[rows]], 1)
    skipped: list[str] = []

    def split(event: np.ndarray) -> np.ndarray:
        return folds.stratified(cases, event, STATES, settings.folds, settings.seed)

    if labels.folds:
        parts, skipped = folds.given(labels, rows, true[:, 1].astype(int))
    else:
        parts = split(true[:, 1].astype(int))
    each = [(part, true) for part in parts]
    for i in range(settings.shuffles):
        other = permuted(cases, true, [settings.seed, 7, i])
        again = parts if labels.folds else split(other[:, 1].astype(int))
        each += [(part, other) for part in again]
    outcome = np.array([values for _, values in each])
    return Plan(
        np.array([part for part, _ in each]),
        np.array([case_weights(part, cases) for part, _ in each]),
        outcome[..., 0],
        outcome[..., 1],
        len(parts),
        skipped,
    )


def _targets(plan: Plan, settings: Settings) -> np.ndarray:
    """(p, n, 2) bin or time, and event; the bins from each row's training part alone."""
    first = plan.time
    if settings.survival == "nll":
        first = np.zeros(plan.time.shape)
        for i, (part, time, event) in enumerate(
            zip(plan.parts, plan.time, plan.event, strict=True)
        ):
            train = part == folds.TRAIN
            first[i] = bin_of(time, quantile_edges(time[train], event[train], settings.time_bins))
    return np.stack([first, plan.event], -1).astype(np.float32)


def _linear(bags: list[MilBag], plan: Plan, pairs: np.ndarray) -> np.ndarray:
    """(q,) risks by Cox regression with a ridge on mean-pooled features."""
    means = np.array([bag.features.mean(0) for bag in bags])
    risk = np.zeros(len(pairs))
    for row in np.unique(pairs[:, 0]):
        train = plan.parts[row] == folds.TRAIN
        mean, std = means[train].mean(0), means[train].std(0)
        x = (means - mean) / np.where(std > 1e-8, std, 1)
        penalty = PENALTY * x.shape[1]
        b = cox_ridge(x[train], plan.time[row, train], plan.event[row, train], penalty)
        mine = pairs[:, 0] == row
        risk[mine] = x[pairs[mine, 1]] @ b
    return risk


def _by_case(pairs: np.ndarray, risk: np.ndarray, plan: Plan, bags: list[MilBag]) -> OutOfFold:
    """Averages the risks of a case's bags, per row of the plan."""
    keys = [(row, bags[bag].case_id) for row, bag in pairs.tolist()]
    found = sorted(set(keys))
    at = np.array([found.index(key) for key in keys])
    first = [int(np.flatnonzero(at == i)[0]) for i in range(len(found))]
    row, bag = pairs[first].T
    return OutOfFold(
        risk=np.array([risk[at == i].mean() for i in range(len(found))]),
        time=plan.time[row, bag],
        event=plan.event[row, bag].astype(int),
        folds=np.array([member for member, _ in found]),
        cases=np.array([case for _, case in found]),
    )


def _write_cases(folder: Path, found: OutOfFold) -> None:
    """cases.csv: one row per case and fold that tested it."""
    columns = ["case_id", "fold", "time_months", "event", "risk"]
    values = (found.cases, found.folds, found.time, found.event, found.risk)
    rows = [
        dict(zip(columns, rounded(list(row)), strict=True)) for row in zip(*values, strict=True)
    ]
    write_csv(folder / "cases.csv", rows, columns)
