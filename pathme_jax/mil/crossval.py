"""The cross-validation itself: the plan's members, their training, out-of-fold scores, measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.files import write_json
from pathme_jax.mil import baselines, buckets, folds, population, saved, sweep
from pathme_jax.mil.bags import Cohort, MilBag, make_bags, read_colour
from pathme_jax.mil.feed import memory
from pathme_jax.mil.heads import make
from pathme_jax.mil.outcomes import Found, Outcome
from pathme_jax.mil.outputs import (
    rounded,
    write_attention,
    write_history,
    write_scores,
    write_sweep,
)
from pathme_jax.mil.plan import Plan, make_plan, of_cases, once, targets_of
from pathme_jax.mil.settings import Settings
from pathme_jax.mil.table import Table

FEW_CASES = 20
RISK_SET = 8  # bags a step, at least, where the step's bags are the risk set
# Row of the table of results to pairs (q, 2) and scores (q, c).
Scores = dict[str, tuple[np.ndarray, np.ndarray]]


def fit_plan(
    bags: list[MilBag], table: Table, plan: Plan, settings: Settings, name: str
) -> tuple[population.Population, list[buckets.Bucket], np.ndarray, np.ndarray]:
    """Each of the p rows of the plan as `settings.seeds` members, of the best of the candidates of `settings.sweep`;
    the bags, whole; (p,) which candidate that is, and (p, candidates) validation losses.

    Raises:
        UserError: of a fold no candidate has a validation loss.
    """
    tried = sweep.candidates(settings)
    p, cases = len(plan.parts), [bag.case_id for bag in bags]
    targets = np.array(
        [
            targets_of(table.outcomes, part, [truth[i] for truth in plan.truth], cases)
            for i, part in enumerate(plan.parts)
        ]
    )
    each, at, seed = np.indices((p, len(tried), settings.seeds)).reshape(3, -1)
    members = population.Members(
        parts=plan.parts[each],
        targets=targets[each],
        weights=plan.weights[each],
        seeds=settings.seed + seed,
        rates=np.array([candidate["learning_rate"] for candidate in tried])[at],
        decays=np.array([candidate["weight_decay"] for candidate in tried])[at],
    )
    head = make(settings.head, table.tasks.outputs, head_sizes(settings), settings.options)
    schedule = population.Schedule(
        settings.epochs, settings.batch, settings.patience, settings.seed
    )
    training = _packed(bags, table, settings)
    fitted = population.fit(
        head,
        table.tasks,
        training,
        members,
        schedule,
        resident=int(settings.device_gb * 2**30) or None,
        instances=settings.bag_devices,
        name=name,
    )
    best, losses = sweep.choose(fitted, p, len(tried), settings.seeds)
    for fold, each_loss in zip(plan.names, losses, strict=False):
        if settings.sweep and np.isnan(each_loss).all():
            raise UserError(
                f"--sweep, but in {fold} no candidate has a validation loss",
                "Its validation part must tell something (an event, for survival); or lower the rates",
            )
    most, whole = settings.max_instances, training
    if most and any(bag.features.shape[0] > most for bag in bags):
        whole = buckets.pack([bag.features for bag in bags], [bag.cells for bag in bags])
    own = (np.arange(p) * len(tried) + best) * settings.seeds
    members_of = (own[:, None] + np.arange(settings.seeds)).ravel()
    return fitted.take(members_of), whole, best, losses


def _packed(bags: list[MilBag], table: Table, settings: Settings) -> list[buckets.Bucket]:
    """As they are trained on."""
    fine: dict[str, Any] = {}
    if any(task.kind == "cox" for task in table.tasks.each):
        # A step's bags are its risk set, and of one size: few sizes, lest the set be a bag or two.
        fine["sizes"] = max(1, len(bags) // (4 * settings.batch))
    return buckets.pack(
        [bag.features for bag in bags],
        [bag.cells for bag in bags],
        most=settings.max_instances or None,
        seed=settings.seed,
        multiple=settings.bag_devices,
        **fine,
    )


def head_sizes(settings: Settings) -> dict[str, Any]:
    return {key: getattr(settings, key) for key in ("hidden", "attention", "dropout")}


def answers(
    fitted: population.Population,
    packed: list[buckets.Bucket],
    tested: np.ndarray,
    seeds: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each task (q, c) scores, and q attention vectors, of pairs of plan row and bag, averaged over seeds."""
    scores: list[Any] = [0] * len(fitted.tasks.each)
    attention: list[Any] = [0] * len(tested)
    for seed in range(seeds):
        pairs = tested * [seeds, 1] + [seed, 0]
        logits, rows = population.predict(fitted, packed, pairs)
        for t, own in enumerate(fitted.tasks.logits_of(logits)):
            scores[t] = scores[t] + fitted.tasks.each[t].predict(own) / seeds
        for i, each in enumerate(rows):
            attention[i] = attention[i] + shown_attention(fitted, each, logits[i]) / seeds
    return scores, attention


def shown_attention(
    fitted: population.Population, rows: np.ndarray, logits: np.ndarray
) -> np.ndarray:
    """(a, m) to (m,): the row of the class it says, where the head has one for each logit; else the rows' mean."""
    first = fitted.tasks.classes
    if getattr(fitted.head, "per_class", False) and first is not None:
        before = sum(task.outputs for task in fitted.tasks.each[:first])
        return rows[before + int(fitted.tasks.logits_of(logits)[first].argmax())]
    return rows.mean(0)


def describe(cohort: Cohort, table: Table, settings: Settings) -> str:
    """What `evaluate` would do, in lines.

    Raises:
        UserError: as `evaluate`.
    """
    _check(table, settings)
    bags = make_bags(cohort.slides, table, settings.bag)
    plan = make_plan(bags, table, settings)
    features = [bag.features for bag in bags]
    packed = _packed(bags, table, settings)
    size = sum(bucket.bag_bytes * len(bucket.index) for bucket in packed)
    room = int(settings.device_gb * 2**30) or memory()
    head = make(settings.head, table.tasks.outputs, head_sizes(settings), settings.options)
    lines = [
        f"{len(cohort.slides)} slides of {len({bag.case_id for bag in bags})} patients, "
        f"{sum(map(len, features))} instances of width {features[0].shape[1]}; "
        f"{len(cohort.problems)} slides left out"
    ]
    for outcome, truth in zip(table.outcomes, plan.truth, strict=True):
        own, task = _known(bags, truth[0]), outcome.task
        about = rounded(outcome.summary(own))
        lines.append(f"{task.name} ({task.kind}): {len(own)} of them know it, {about}")
    tried = len(sweep.candidates(settings))
    swept = f"x {tried} settings, " if settings.sweep else ""
    lines += [
        f"{plan.folds} folds ({', '.join(table.folds) or 'stratified by case'}), x {settings.seeds} seeds, {swept}and"
        f" {settings.shuffles} controls: {len(plan.parts) * settings.seeds * tried} heads, {settings.head} of"
        f" {population.parameters(head, features[0].shape[1]):,} parameters each",
        f"bags of {len(packed)} sizes, padding x {buckets.waste(packed):.2f}, {size / 2**30:.2f} GB, "
        f"{'streamed to' if size > room else 'kept on'} the device; "
        f"{settings.epochs} epochs of {-(-len(bags) // settings.batch)} steps or a few more",
    ]
    return "\n".join([*lines, *plan.skipped])


def evaluate(
    folder: Path,
    cohort: Cohort,
    table: Table,
    settings: Settings,
    colour: Path | None,
    about: dict[str, Any],
    made_of: dict[str, Any],
) -> None:
    """Trains, predicts out of fold, and writes all of a run's files but run.json.

    Args:
        about: what else metrics.json shall say; `name` is told while training.
        made_of: what the features are, see `saved.features_of`.

    Raises:
        UserError: settings that a task cannot use; see `make_plan`.
    """
    _check(table, settings)
    bags = make_bags(cohort.slides, table, settings.bag)
    rgb = read_colour(colour, bags) if colour else None
    plan = make_plan(bags, table, settings)
    k, cases = plan.folds, [bag.case_id for bag in bags]
    fitted, packed, best, losses = fit_plan(bags, table, plan, settings, about["name"])
    tested = np.argwhere(plan.parts == folds.TEST)  # pairs of plan row and bag, true labels first
    scores, attention = answers(fitted, packed, tested, settings.seeds)
    _finite(scores, tested, plan, table)
    means = np.array([np.asarray(bag.features).mean(0) for bag in bags])
    real = tested[:, 0] < k
    chosen: dict[str, Any] = {}
    if settings.sweep:
        tried = sweep.candidates(settings)
        write_sweep(folder, tried, losses[:k], best[:k])
        chosen["chosen"] = [tried[i] for i in best[:k]]
    scales: dict[str, list[Any]] = {}
    for t, outcome in enumerate(table.outcomes):
        truth = plan.truth[t]
        scale = np.array(
            [
                outcome.scale(once(part, of, cases), of)
                for part, of in zip(plan.parts, truth, strict=True)
            ]
        )
        scales[outcome.task.name] = scale[:k].tolist()
        said = scores[t] * scale[tested[:, 0], :1] + scale[tested[:, 0], 1:]
        found: Scores = {
            "head": (tested[real], said[real]),
            "mean_pool": (tested[real], _linear(outcome, means, plan, t, tested[real])),
        }
        if rgb is not None:
            found["mean_colour"] = (tested[real], _linear(outcome, rgb, plan, t, tested[real]))
        if settings.shuffles:
            found["shuffled"] = (tested[~real], said[~real])
        rows = {row: by_case(pairs, of, truth, bags) for row, (pairs, of) in found.items()}
        write_scores(folder / outcome.task.name, outcome, bags, *found["head"], truth, rows["head"])
        known = _known(bags, plan.truth[t][0])
        content = _metrics(outcome, known, rows, cohort, table, bags, plan, packed, settings)
        write_json(folder / outcome.task.name / "metrics.json", content | chosen | about)
    write_history(folder, fitted.history[: k * settings.seeds : settings.seeds])
    own = [each for each, is_real in zip(attention, real, strict=True) if is_real]
    write_attention(folder, bags, tested[real], own)
    saved.save(
        folder / "heads",
        fitted.take(np.arange(k * settings.seeds)),
        head=settings.head,
        options=settings.options,
        sizes=head_sizes(settings),
        tasks=table.tasks,
        folds=k,
        seeds=settings.seeds,
        features=made_of,
        scales=scales,
    )


def _finite(scores: list[np.ndarray], tested: np.ndarray, plan: Plan, table: Table) -> None:
    for task, said in zip(table.tasks.each, scores, strict=True):
        bad = ~np.isfinite(said).all(1)
        if bad.any():
            row = int(tested[bad][0, 0])
            which = plan.names[row] if row < plan.folds else "a control"
            raise UserError(
                f"the head of {which} says of {task.name} what is not a number: its training diverged",
                "Lower the learning rate",
            )


def _check(table: Table, settings: Settings) -> None:
    sweep.candidates(settings)
    kinds = [task.kind for task in table.tasks.each]
    if "cox" in kinds and settings.batch < RISK_SET:
        raise UserError(
            f"--batch {settings.batch} with a cox task, whose risk set is the bags of a step",
            f"Give --batch {RISK_SET} or more, or nll:… instead of cox:…",
        )


def _linear(
    outcome: Outcome, vectors: np.ndarray, plan: Plan, task: int, pairs: np.ndarray
) -> np.ndarray:
    """(q, c) scores of pairs of plan row and bag by a linear model of one vector a bag (n, d)."""
    scores: Any = None
    for row in np.unique(pairs[:, 0]):
        weights = plan.weights[row, :, task]
        x = baselines.standardised(vectors, weights > 0)
        said = outcome.baseline(x, plan.parts[row], plan.truth[task][row], weights)
        scores = np.zeros((len(pairs), said.shape[1])) if scores is None else scores
        mine = pairs[:, 0] == row
        scores[mine] = said[pairs[mine, 1]]
    return scores


def by_case(pairs: np.ndarray, scores: np.ndarray, truth: np.ndarray, bags: list[MilBag]) -> Found:
    """Averages the scores of a case's bags whose truth is known, per plan row; truth (p, n, w)."""
    # A slide may not know what another slide of the case does.
    kept = ~np.isnan(truth[pairs[:, 0], pairs[:, 1]]).all(1)
    pairs, scores = pairs[kept], scores[kept]
    keys = [(row, bags[bag].case_id) for row, bag in pairs.tolist()]
    found = {key: i for i, key in enumerate(sorted(set(keys)))}
    at = np.array([found[key] for key in keys])
    of = np.full((len(found), truth.shape[2]), np.nan)
    of[at] = truth[pairs[:, 0], pairs[:, 1]]
    total = np.zeros((len(found), scores.shape[1]))
    np.add.at(total, at, scores)
    return Found(
        scores=total / np.bincount(at)[:, None],
        truth=of,
        folds=np.array([row for row, _ in found]),
        cases=np.array([case for _, case in found]),
    )


def _known(bags: list[MilBag], truth: np.ndarray) -> np.ndarray:
    """(k, w) truth of the cases that know it, from that of the bags (n, w)."""
    _, unit = np.unique([bag.case_id for bag in bags], return_inverse=True)
    own = of_cases(truth, unit)
    return own[~np.isnan(own).all(1)]


def _metrics(
    outcome: Outcome,
    cases: np.ndarray,
    rows: dict[str, Found],
    cohort: Cohort,
    table: Table,
    bags: list[MilBag],
    plan: Plan,
    packed: list[buckets.Bucket],
    settings: Settings,
) -> dict[str, Any]:
    """The content of a task's metrics.json."""
    task = outcome.task
    return rounded(
        {
            "task": task.name,
            "kind": task.kind,
            "measure": outcome.measure,
            "classes": list(task.names),
            "cases": len(cases),
            **outcome.summary(cases),
            "slides": len(cohort.slides),
            "instances": sum(bag.features.shape[0] for bag in bags),
            "width": bags[0].features.shape[1],
            "bag": settings.bag,
            "head": settings.head,
            "padding": buckets.waste(packed),
            "folds": plan.folds,
            "fold_names": plan.names,
            "fold_source": ", ".join(table.folds) or "stratified by case",
            "folds_left_out": plan.skipped,
            "too_few_to_judge": outcome.evidence(cases) < FEW_CASES,
            "rows": {row: outcome.measures(each, settings.seed) for row, each in rows.items()},
            "read": table.notes,
            "orphans": cohort.orphans,
            "problems": cohort.problems,
            "blank_label": table.unlabelled,
        }
    )
