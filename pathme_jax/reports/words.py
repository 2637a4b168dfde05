"""The report's sentences: what the numbers mean, and what they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TRANSDUCTIVE = (
    "The encoders saw these same slides unlabelled, those of the test folds included. "
    "They never saw a diagnosis, but they saw the test images (a transductive setting): "
    "slides of another hospital may score lower."
)
TOO_FEW = (
    "With fewer than 20 cases (of survival: events) the results are too few to judge: they show that the pipeline "
    "runs, not that the classifier works."
)
SYNTHETIC = (
    "These slides are synthetic: drawn by a program that knows the answer. The scores say whether the "
    "methods find what was planted, and nothing about patients."
)
HOW_TO_READ = {
    "auroc": "AUROC is the chance that a case of the class gets a higher score than a case of another: 0.5 is "
    "guessing, 1 is perfect. Only cases tested by the same model are compared.",
    "c_index": "The C-index is the chance that of two patients the one with the earlier event was given the higher "
    "risk: 0.5 is guessing, 1 is perfect. Only patients tested by the same model are compared.",
    "pearson": "Pearson's r says how closely the predictions follow the true numbers along a line: 0 is guessing, "
    "1 is perfect.",
}
INTERVALS = (
    "In brackets: the range that 95 of 100 redrawn sets of the same patients would give; for a perfect score it is "
    "1.00–1.00, which overstates how sure a small cohort can be. p: how often outcomes dealt out at random score as "
    "high."
)
CONTROLS = (
    "Mean pool sees only a slide's average feature, mean colour only its average stain, and shuffled labels were "
    "trained on wrong answers: it should stay at guessing, and a classifier no better than these has learned nothing "
    "of its own."
)
COMPARED = (
    "The second less the first, on the same patients and folds: p says how often exchanging the two models' scores "
    "at random makes as large a difference."
)
ATTENTION = (
    "Where the model that did not train on the slide looked: tiles by rank of their attention, from least to "
    "most. High attention is not proof of disease; it shows what moved the score, either way."
)

_BAD_SIGNS = {
    "teacher_entropy": "Bad: it falls to 0, or stays flat at its highest value from the start: "
    "the teacher no longer tells images apart.",
    "prototype_usage": "Bad: it falls towards 0: few prototypes take all images. 1 is even use.",
    "feature_std": "Bad: it falls towards 0: all images get the same feature.",
    "effective_rank": "Bad: it falls towards 1, or far below that of its inputs: "
    "the features use few directions.",
}
_NAMES = {
    "loss": "total loss",
    "teacher_entropy": "teacher entropy (nats)",
    "prototype_usage": "prototype usage",
    "feature_std": "feature spread",
    "effective_rank": "effective rank",
}


def bad_sign(key: str) -> str | None:
    """What collapse looks like in this metric, or None if it is no such diagnostic."""
    return _BAD_SIGNS.get(key.split("/")[0])


def metric_name(key: str) -> str:
    head, _, tail = key.partition("/")
    name = _NAMES.get(head, head.replace("_", " "))
    tail = tail.replace("_", " ")
    if head == "loss" and tail:
        return f"{tail} loss"
    return f"{name}: {tail}" if tail else name


_MEASURES = {
    "auroc": "AUROC",
    "c_index": "C-index",
    "pearson": "Pearson r",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "auprc": "AUPRC",
    "f1_macro": "F1, mean of classes",
    "f1_weighted": "F1, weighted",
    "kappa": "Cohen's kappa",
    "kappa_linear": "kappa, linear weights",
    "kappa_quadratic": "kappa, quadratic weights",
    "brier": "Brier score",
    "integrated_brier": "integrated Brier score",
    "ece_width": "calibration error, equal bins",
    "ece_mass": "calibration error, equal counts",
    "r2": "R²",
    "mae": "mean absolute error",
    "mean_auc": "AUC over time",
    "logrank_p": "log-rank p",
    "logrank_chi2": "log-rank χ²",
}
CHANCE = {"auroc": 0.5, "c_index": 0.5, "pearson": 0.0}
ROWS = {
    "head": "Head",
    "mean_pool": "Mean pool",
    "mean_colour": "Mean colour",
    "shuffled": "Shuffled labels",
}
_SAYS = {
    "classes": "tell the classes apart",
    "labels": "tell who has the labels",
    "number": "tell the high from the low",
    "nll": "order the patients by risk",
    "cox": "order the patients by risk",
}
_NOTHING = {
    "auroc": "no two cases of different classes were tested in one fold",
    "c_index": "no two patients tested in one fold can be ordered",
    "pearson": "the true numbers or the predictions do not vary",
}


def measure_name(name: str) -> str:
    if name.startswith("pooled_"):
        return f"{measure_name(name.removeprefix('pooled_'))}, folds pooled"
    return _MEASURES.get(name, name.replace("_", " "))


def place(name: str) -> tuple[int, str]:
    """What measures are sorted by."""
    names = list(_MEASURES)
    return (names.index(name) if name in names else len(names)), name


def plain(value: float | None) -> str:
    """Two digits, or a dash where there is no number."""
    return "–" if value is None or value != value else f"{value:.2f}"


def p_value(p: float | None) -> str:
    if p is None or p != p:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def spread(low_high: Sequence[float | None]) -> str:
    """(0.71–0.96), with "to" between where one is negative; nothing where there is no interval."""
    low, high = low_high
    if low is None or high is None:
        return ""
    return f" ({low:.2f} to {high:.2f})" if low < 0 else f" ({low:.2f}–{high:.2f})"


def score(row: dict[str, Any] | None, measure: str) -> str:
    """0.87 (0.71–0.96), or a dash where nothing could be compared."""
    if row is None or row.get(measure) is None:
        return "–"
    return f"{row[measure]:.2f}{spread(row['interval'])}"


def value(row: dict[str, Any], measure: str) -> str:
    """AUROC 0.87 (0.71–0.96)."""
    return f"{measure_name(measure)} {score(row, measure)}"


def difference(row: dict[str, Any]) -> str:
    """+0.04 (-0.01 to +0.09)."""
    if row.get("difference") is None:
        return "–"
    low, high = row["interval"]
    return f"{row['difference']:+.2f}" + ("" if low is None else f" ({low:+.2f} to {high:+.2f})")


def further(found: dict[str, Any] | None) -> str:
    """A further measure {value, interval}, to three digits where two would round it away."""
    if found is None or found.get("value") is None:
        return "–"
    number = found["value"]
    interval = found.get("interval") or [None, None]
    if 0 < abs(number) < 0.1 or abs(number) >= 100:
        inside = "" if None in interval else f" ({interval[0]:.3g} to {interval[1]:.3g})"
        return f"{number:.3g}{inside}"
    return f"{number:.2f}{spread(interval)}"


def counted(metrics: dict[str, Any]) -> str:
    """How many cases, and of what."""
    text = f"{metrics['cases']} case{'' if metrics['cases'] == 1 else 's'}"
    if metrics.get("cases_per_class"):
        counts = metrics["cases_per_class"]
        each = ", ".join(f"{name}: {counts[name]}" for name in metrics["classes"])
        return f"{text} ({each}{' positive' if metrics['kind'] == 'labels' else ''})"
    if "events" in metrics:
        return f"{text} ({metrics['events']} with an event)"
    if metrics.get("mean") is not None:
        return f"{text} (mean {metrics['mean']:.3g}, standard deviation {metrics['std']:.3g})"
    return text


def done(run: list[dict[str, Any]]) -> str:
    """What a run did, in one sentence, from its tasks as `sections.task` has them."""
    tasks = [next(iter(task["bags"].values())) for task in run]
    one = tasks[0]
    what = [f"{task['task']} ({_A_KIND[task['kind']]})" for task in tasks]
    cases = "" if one.get("bag") == "slide" else ", all slides of a case in one bag"
    return (
        f"A head of kind {one['head']} was trained on {one['slides']:,} slides of {one['cases']:,} cases{cases} "
        f"({one['instances']:,} instances, features {one['name']}) to predict {_and(what)}, and tested in {one['folds']}-fold "
        f"cross-validation, no patient in two parts ({one['fold_source']})."
    )


def settings(chosen: dict[str, float]) -> str:
    """Such as "learning rate 0.001, weight decay 0"."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in chosen.items())


_A_KIND = {
    "classes": "classes",
    "labels": "labels that may hold together",
    "number": "a number",
    "nll": "survival in bins of time",
    "cox": "survival, Cox",
}


def verdict(task: str, metrics: dict[str, dict[str, Any]]) -> str:
    """Plain sentences on a task, from each kind of bag's metrics; without "bags" where there is one kind only."""
    any_one = next(iter(metrics.values()))
    measure, several = any_one["measure"], len(metrics) > 1
    known = {bag: m for bag, m in metrics.items() if m["rows"]["head"][measure] is not None}
    if not known:
        return f"{task}: {_NOTHING[measure]}, so nothing can be said."
    best = max(known, key=lambda bag: known[bag]["rows"]["head"][measure])
    rows = known[best]["rows"]
    shown = score(rows["head"], measure)
    tied = [bag for bag in known if score(known[bag]["rows"]["head"], measure) == shown]
    stated = f"{measure_name(measure)} {shown}"
    if known[best]["too_few_to_judge"]:
        held = f" with {known[best]['events']} events" if "events" in known[best] else ""
        of = f"The highest is {stated}, of {_and(tied)} bags" if several else f"They gave {stated}"
        return f"{task}: {known[best]['cases']} cases{held} are too few to judge. {of}; any of it may be chance."
    chance = CHANCE[measure]
    if _low(rows["head"]) > chance:
        who = (
            f"{_and(tied)} bags {_SAYS[any_one['kind']]} best"
            if several
            else f"the slides {_SAYS[any_one['kind']]}"
        )
        text = f"{task}: {who}, {stated}."
    elif several:
        text = f"{task}: no kind of bag is surely better than guessing; highest {stated}, {_and(tied)}."
    else:
        text = f"{task}: not surely better than guessing, {stated}."
    pooled = rows.get("mean_pool", {}).get(measure)
    if pooled is not None and pooled >= rows["head"][measure] and _low(rows["head"]) > chance:
        text += f" Mean pooling does as well, {score(rows['mean_pool'], measure)}: attention is not needed for it."
    for other, name in (("mean_colour", "Mean colour"), ("shuffled", "The shuffled-label control")):
        if other in rows and _low(rows[other]) > chance:
            text += f" {name} alone is above chance too, {score(rows[other], measure)}: {_WARNINGS[other]}"
    return text


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _low(row: dict[str, Any]) -> float:
    return row["interval"][0] if row["interval"][0] is not None else float("-inf")


_WARNINGS = {
    "mean_colour": "stain may explain part of it.",
    "shuffled": "distrust this result.",
}
