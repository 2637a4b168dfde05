"""The cross-validation itself: members, training, out-of-fold scores, controls, measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.evaluation.classification import OutOfFold, measures
from pathme_jax.mil import baselines, buckets, folds, population
from pathme_jax.mil.bags import Cohort, MilBag, make_bags
from pathme_jax.mil.heads import make
from pathme_jax.mil.outputs import (
    rounded,
    write_attention,
    write_cases,
    write_history,
    write_predictions,
)
from pathme_jax.mil.settings import Settings
from pathme_jax.mil.tasks import Task, Tasks
from pathme_jax.records.labels import Labels

FEW_CASES = 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who is trained and tested on what.

    Attributes:
        parts, labels, weights: (p, n) of the folds with the true labels, then those of each control.
        folds: of each of these. skipped: folds that were left out, with the reason.
    """

    parts: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    folds: int
    skipped: list[str]


def _plan(bags: list[MilBag], table: Labels, settings: Settings) -> Plan:
    cases = [bag.case_id for bag in bags]
    true = np.array([bag.label for bag in bags])
    skipped: list[str] = []
    if table.folds:
        parts, skipped = folds.given(table, [bag.row for bag in bags], true)
    else:
        parts = folds.stratified(cases, true, table.classes, settings.folds, settings.seed)
    each = [(part, true) for part in parts]
    for i in range(settings.shuffles):
        labels = permuted(cases, true, [settings.seed, 7, i])
        if not table.folds:  # as balanced as the true ones are
            parts = folds.stratified(cases, labels, table.classes, settings.folds, settings.seed)
        each += [(part, labels) for part in parts]
    return Plan(
        np.array([part for part, _ in each]),
        np.array([labels for _, labels in each]),
        np.array([bag_weights(*one, cases) for one in each]),
        len(each) // (1 + settings.shuffles),
        skipped,
    )


def bag_weights(parts: np.ndarray, labels: np.ndarray, cases: list[str]) -> np.ndarray:
    """(n,) weights of one member's bags: 0 off the training part, else every class weighs the same in sum, and
    every case of a class, however many slides it has; their mean over the training bags is 1."""
    weights = np.zeros(len(cases))
    for label in np.unique(labels[parts == folds.TRAIN]):
        mine = case_weights(np.where(labels == label, parts, folds.UNUSED), cases)
        weights += mine / mine.sum()
    return weights * (parts == folds.TRAIN).sum() / max(weights.sum(), 1e-12)


def case_weights(parts: np.ndarray, cases: list[str]) -> np.ndarray:
    """(n,) weights of one member's bags: 0 off the training part, else every case weighs the same in sum; their
    mean over the training bags is 1."""
    train = parts == folds.TRAIN
    _, unit = np.unique(cases, return_inverse=True)
    slides = np.bincount(unit, train)[unit]
    weights = np.where(train, 1 / np.maximum(slides, 1), 0)
    return weights * train.sum() / max(weights.sum(), 1e-12)


def fit_plan(
    bags: list[MilBag],
    tasks: Tasks,
    parts: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    settings: Settings,
    name: str,
) -> tuple[population.Population, list[buckets.Bucket]]:
    """Each of the p rows of parts (p, n), targets (p, n, t) and weights (p, n) as `settings.seeds` members, side
    by side; and the bags, whole."""
    features, cells = [bag.features for bag in bags], [bag.cells for bag in bags]
    each = np.repeat(np.arange(len(parts)), settings.seeds)
    members = population.Members(
        parts=parts[each],
        targets=targets[each].astype(np.float32),
        weights=weights[each],
        seeds=settings.seed + np.arange(len(each)) % settings.seeds,
        rates=np.full(len(each), settings.learning_rate),
        decays=np.full(len(each), settings.weight_decay),
    )
    sizes = {key: getattr(settings, key) for key in ("hidden", "attention", "dropout")}
    head = make(settings.head, tasks.outputs, sizes, settings.options)
    schedule = population.Schedule(
        settings.epochs, settings.batch, settings.patience, settings.seed
    )
    most = settings.max_instances
    training = buckets.pack(features, cells, most=most, seed=settings.seed)
    fitted = population.fit(head, tasks, training, members, schedule, name=name)
    cut = any(len(bag) > most for bag in features)
    return fitted, buckets.pack(features, cells) if cut else training


def answers(
    fitted: population.Population,
    packed: list[buckets.Bucket],
    tested: np.ndarray,
    seeds: int,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(q, c) scores and q attention vectors of pairs of plan row and bag, averaged over seeds."""
    scores: Any = 0
    attention: list[Any] = [0] * len(tested)
    for seed in range(seeds):
        pairs = tested * [seeds, 1] + [seed, 0]
        logits, rows = population.predict(fitted, packed, pairs)
        found = fitted.tasks.each[0].predict(logits)
        scores = scores + found / seeds
        for i, each in enumerate(rows):
            # A row a class: that of the class it says. Else the heads' mean.
            own = each[found[i].argmax()] if len(each) == found.shape[1] else each.mean(0)
            attention[i] = attention[i] + own / seeds
    return scores, attention


def permuted(cases: list[str], values: np.ndarray, seed: list[int]) -> np.ndarray:
    """(n, …) the values of the cases, dealt to other cases; all bags of a case share one."""
    _, first, unit = np.unique(cases, return_index=True, return_inverse=True)
    return np.random.default_rng(seed).permutation(values[first])[unit]


def evaluate(
    folder: Path, cohort: Cohort, table: Labels, settings: Settings, colour: Path | None, name: str
) -> dict[str, Any]:
    """Trains, predicts out of fold, writes everything but metrics.json, and returns that."""
    bags = make_bags(cohort.slides, table, settings.bag)
    rgb = baselines.read_colour(colour, bags) if colour else None
    plan = _plan(bags, table, settings)
    k = plan.folds
    tasks = Tasks((Task(table.task, "classes", tuple(table.classes)),))
    targets = plan.labels[..., None]
    fitted, packed = fit_plan(bags, tasks, plan.parts, targets, plan.weights, settings, name)
    tested = np.argwhere(plan.parts == folds.TEST)  # pairs of member and bag, true labels first
    scores, attention = answers(fitted, packed, tested, settings.seeds)
    real = int((tested[:, 0] < k).sum())
    features = [bag.features for bag in bags]
    means = np.array([each.mean(0) for each in features])

    def logistic(vectors: np.ndarray) -> np.ndarray:
        classes, pairs = len(table.classes), tested[:real]
        return baselines.logistic(vectors, plan.labels, plan.weights, classes, pairs)

    found = {"head": scores[:real], "mean_pool": logistic(means)}
    if rgb is not None:
        found["mean_colour"] = logistic(rgb)
    rows = {row: _by_case(tested[:real], each, plan.labels, bags) for row, each in found.items()}
    if settings.shuffles:
        rows["shuffled"] = _by_case(tested[real:], scores[real:], plan.labels, bags)

    write_predictions(folder, bags, table.classes, tested[:real], scores[:real])
    write_cases(folder, table.classes, rows["head"])
    write_history(folder, fitted.history[: k * settings.seeds : settings.seeds])
    write_attention(folder, bags, tested[:real], attention[:real])
    label_of = {bag.case_id: bag.label for bag in bags}
    metrics = {
        "task": table.task,
        "classes": table.classes,
        "cases": len(label_of),
        "cases_per_class": {
            name: list(label_of.values()).count(i) for i, name in enumerate(table.classes)
        },
        "slides": len(cohort.slides),
        "instances": sum(map(len, features)),
        "width": means.shape[1],
        "bag": settings.bag,
        "head": settings.head,
        "padding": buckets.waste(packed),
        "folds": k,
        "fold_source": ", ".join(table.folds) or "stratified by case",
        "folds_left_out": plan.skipped,
        "too_few_to_judge": len(label_of) < FEW_CASES,
        "rows": {row: measures(each, settings.seed) for row, each in rows.items()},
        "orphans": cohort.orphans,
        "problems": cohort.problems,
        "blank_label": table.unlabelled,
    }
    return rounded(metrics)


def _by_case(
    pairs: np.ndarray, scores: np.ndarray, of_member: np.ndarray, bags: list[MilBag]
) -> OutOfFold:
    """Averages the scores of a case's bags, per member."""
    keys = [(member, bags[bag].case_id) for member, bag in pairs.tolist()]
    found = sorted(set(keys))
    row = np.array([found.index(key) for key in keys])
    labels = np.zeros(len(found), int)
    labels[row] = of_member[pairs[:, 0], pairs[:, 1]]
    return OutOfFold(
        scores=np.array([scores[row == i].mean(0) for i in range(len(found))]),
        labels=labels,
        folds=np.array([member for member, _ in found]),
        cases=np.array([case for _, case in found]),
    )
