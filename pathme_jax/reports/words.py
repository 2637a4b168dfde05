"""The report's sentences: what the numbers mean, and what they do not."""

from __future__ import annotations

from typing import Any

TRANSDUCTIVE = (
    "The encoders saw these same slides unlabelled, those of the test folds included. "
    "They never saw a diagnosis, but they saw the test images (a transductive setting): "
    "slides of another hospital may score lower."
)
TOO_FEW = (
    "With fewer than 20 cases the results are too few to judge: they show that the pipeline runs, "
    "not that the classifier works."
)
SYNTHETIC = (
    "These slides are synthetic: drawn by a program that knows the answer. The scores say whether the "
    "methods find what was planted, and nothing about patients."
)
HOW_TO_READ = (
    "AUROC is the chance that a case of the class gets a higher score than a case of another: 0.5 is guessing, "
    "1 is perfect. Only cases tested by the same model are compared. In brackets: the range that 95 of 100 "
    "redrawn sets of the same patients would give; for a perfect score it is 1.00–1.00, which overstates how "
    "sure a small cohort can be. Mean pool sees only a slide's average feature, mean colour "
    "only its average stain, and shuffled labels were trained on wrong answers: it should stay near 0.5, "
    "and a classifier no better than these has learned nothing of its own."
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


def score(row: dict[str, Any] | None) -> str:
    """0.87 (0.71–0.96), or a dash where nothing could be compared."""
    if row is None or row["auroc"] is None:
        return "–"
    low, high = row["interval"]
    interval = "" if low is None else f" ({low:.2f}–{high:.2f})"
    return f"{row['auroc']:.2f}{interval}"


def verdict(task: str, metrics: dict[str, dict[str, Any]]) -> str:
    """One or two plain sentences on a task, from each kind of bag's metrics."""
    known = {bag: m for bag, m in metrics.items() if m["rows"]["head"]["auroc"] is not None}
    if not known:
        return f"{task}: no two cases of different classes were tested in one fold, so nothing can be said."
    best = max(known, key=lambda bag: known[bag]["rows"]["head"]["auroc"])
    rows = known[best]["rows"]
    value = score(rows["head"])
    tied = [bag for bag in known if score(known[bag]["rows"]["head"]) == value]
    named = tied[0] if len(tied) == 1 else f"{', '.join(tied[:-1])} and {tied[-1]}"
    if known[best]["too_few_to_judge"]:
        return (
            f"{task}: {known[best]['cases']} cases are too few to judge. The highest AUROC is {value}, "
            f"of {named} bags; any of it may be chance."
        )
    if _low(rows["head"]) > 0.5:
        text = f"{task}: {named} bags tell the classes apart best, AUROC {value}."
    else:
        text = f"{task}: no kind of bag is surely better than guessing; highest AUROC {value}, {named}."
    for other, name in (("mean_colour", "Mean colour"), ("shuffled", "The shuffled-label control")):
        if other in rows and _low(rows[other]) > 0.5:
            text += f" {name} alone is above chance too, {score(rows[other])}: {_WARNINGS[other]}"
    return text


def _low(row: dict[str, Any]) -> float:
    return row["interval"][0] if row["interval"][0] is not None else 0.0


_WARNINGS = {
    "mean_colour": "stain may explain part of it.",
    "shuffled": "distrust this result.",
}
