"""The cross-validation itself: members, training, out-of-fold scores, controls, measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.evaluation.classification import OutOfFold, measures
from pathme_jax.mil import baselines, folds, train
from pathme_jax.mil.bags import Cohort, MilBag, make_bags
from pathme_jax.mil.outputs import (
    rounded,
    write_attention,
    write_cases,
    write_history,
    write_predictions,
)
from pathme_jax.mil.settings import Settings
from pathme_jax.mil.train import Members
from pathme_jax.records.labels import Labels

FEW_CASES = 20


def _members(
    bags: list[MilBag], table: Labels, settings: Settings
) -> tuple[Members, int, list[str]]:
    """The k folds with the true labels, then those of each control; k, and why folds were left out."""
    cases = [bag.case_id for bag in bags]
    true = np.array([bag.label for bag in bags])
    skipped: list[str] = []
    if table.folds:
        parts, skipped = folds.given(table, [bag.row for bag in bags], true)
    else:
        parts = folds.stratified(cases, true, table.classes, settings.folds, settings.seed)
    populations = [(parts, true)]
    for i in range(settings.shuffles):
        labels = _shuffled(cases, true, [settings.seed, 7, i])
        if not table.folds:  # as balanced as the true ones are
            parts = folds.stratified(cases, labels, table.classes, settings.folds, settings.seed)
        populations.append((parts, labels))
    members = [(part, labels) for parts, labels in populations for part in parts]
    return (
        Members(
            parts=np.array([part for part, _ in members]),
            labels=np.array([labels for _, labels in members]),
            weights=np.array([train.bag_weights(*member, cases) for member in members]),
        ),
        len(populations[0][0]),
        skipped,
    )


def _shuffled(cases: list[str], labels: np.ndarray, seed: list[int]) -> np.ndarray:
    _, first, unit = np.unique(cases, return_index=True, return_inverse=True)
    return np.random.default_rng(seed).permutation(labels[first])[unit]


def evaluate(
    folder: Path, cohort: Cohort, table: Labels, settings: Settings, colour: Path | None, name: str
) -> dict[str, Any]:
    """Trains, predicts out of fold, writes everything but metrics.json, and returns that."""
    bags = make_bags(cohort.slides, table, settings.bag)
    rgb = baselines.read_colour(colour, bags) if colour else None
    members, k, skipped = _members(bags, table, settings)
    features = [bag.features for bag in bags]
    means = np.array([each.mean(0) for each in features])
    population = train.fit(features, members, len(table.classes), settings, name)
    tested = np.argwhere(members.parts == folds.TEST)  # pairs of member and bag, true labels first
    scores, attention = train.predict(population, features, tested)
    real = int((tested[:, 0] < k).sum())

    def logistic(vectors: np.ndarray) -> np.ndarray:
        return baselines.logistic(vectors, members, len(table.classes), tested[:real])

    found = {"abmil": scores[:real], "mean_pool": logistic(means)}
    if rgb is not None:
        found["mean_colour"] = logistic(rgb)
    rows = {row: _by_case(tested[:real], each, members, bags) for row, each in found.items()}
    if settings.shuffles:
        rows["shuffled"] = _by_case(tested[real:], scores[real:], members, bags)

    write_predictions(folder, bags, table.classes, tested[:real], scores[:real])
    write_cases(folder, table.classes, rows["abmil"])
    write_history(folder, population.history[:k])
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
        "folds": k,
        "fold_source": ", ".join(table.folds) or "stratified by case",
        "folds_left_out": skipped,
        "too_few_to_judge": len(label_of) < FEW_CASES,
        "rows": {row: measures(each, settings.seed) for row, each in rows.items()},
        "orphans": cohort.orphans,
        "problems": cohort.problems,
        "blank_label": table.unlabelled,
    }
    return rounded(metrics)


def _by_case(
    pairs: np.ndarray, scores: np.ndarray, members: Members, bags: list[MilBag]
) -> OutOfFold:
    """Averages the scores of a case's bags, per member."""
    keys = [(member, bags[bag].case_id) for member, bag in pairs.tolist()]
    found = sorted(set(keys))
    row = np.array([found.index(key) for key in keys])
    labels = np.zeros(len(found), int)
    labels[row] = members.labels[pairs[:, 0], pairs[:, 1]]
    return OutOfFold(
        scores=np.array([scores[row == i].mean(0) for i in range(len(found))]),
        labels=labels,
        folds=np.array([member for member, _ in found]),
        cases=np.array([case for _, case in found]),
    )
