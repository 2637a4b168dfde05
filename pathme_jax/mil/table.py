"""The tasks of a run, read from one label table and joined by slide."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.mil.outcomes import Classes, Labels, Number, Outcome, TimeToEvent
from pathme_jax.mil.tasks import Task, Tasks
from pathme_jax.records.labels import read_labels, read_multilabel, read_number
from pathme_jax.records.splits import read_splits
from pathme_jax.records.survival import read_survival
from pathme_jax.records.tables import fold_columns, open_table

# By the run itself.
TAKEN = ("attention", "heads", "figures", "qupath")
TAKEN += ("run.json", "history.csv", "sweep.csv", "report.html")
KINDS = ("classes", "labels", "number", "nll", "cox")


@dataclasses.dataclass
class Table:
    """Every slide with a known truth of at least one task, in the order of the ids.

    Attributes:
        slide_ids, case_ids: (n,) text.
        outcomes: t of them. truth: of each (n, w), NaN where unknown, see `mil.outcomes`.
        folds: name → (n,) "train", "val", "test" or "" (unused).
        unlabelled: slides of the table without any truth. notes: what was assumed on reading.
    """

    slide_ids: list[str]
    case_ids: list[str]
    outcomes: list[Outcome]
    truth: list[np.ndarray]
    folds: dict[str, list[str]]
    unlabelled: list[str]
    notes: list[str]

    @property
    def tasks(self) -> Tasks:
        return Tasks(tuple(outcome.task for outcome in self.outcomes))

    @property
    def name(self) -> str:
        """Of all tasks together."""
        return "+".join(task.name for task in self.tasks.each)


def read(
    path: str | Path,
    specs: str,
    *,
    classes: Sequence[str] = (),
    fold_prefix: str = "fold_",
    bins: int = 4,
    splits: str | Path | None = None,
) -> Table:
    """Reads tasks such as "grade", "labels:er+pr", "number:hrd,cox:os".

    Args:
        specs: comma separated `[kind:]columns`, of KINDS; classes where no kind is said. labels joins its columns
            by +; nll and cox take a survival endpoint, or nothing where there is one only.
        classes: of the first task of classes, in their order; by default those found.
        bins: of time, for nll.
        splits: split files, which take the place of fold columns; see `records.splits`.

    Raises:
        UserError: an unknown kind, two tasks of one name, a name no folder can have, and what the readers of `records` refuse.
    """
    fold_prefix = "" if splits else fold_prefix  # what the columns say is not used
    found = []
    for spec in specs.split(","):
        found.append(_read_one(Path(path), spec, classes, fold_prefix, bins))
        if found[-1][0].task.kind == "classes":
            classes = ()
    names = [outcome.task.name for outcome, _, _ in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--task {specs}: two tasks called {name!r}", "Give each once")
        if name in TAKEN or not re.fullmatch(r"[^./\\:\0][^/\\:\0]*", name):
            raise UserError(
                f"--task {specs}: {name!r} cannot be the name of the task's folder",
                "Rename the column",
            )
    case_of: dict[str, str] = {}
    for _, rows, _ in found:
        case_of |= dict(zip(rows.slide_ids, rows.case_ids, strict=True))
    slides = sorted(case_of)
    for slide in slides:
        if "/" in slide or "\\" in slide:
            raise UserError(f"{path}: slide {slide!r} holds a folder", "Give the name alone")
    notes = list(dict.fromkeys(note for _, rows, _ in found for note in rows.notes))
    cases = [case_of[slide] for slide in slides]
    if splits:
        folds, said = read_splits(splits, slides, cases)
        notes += said
    else:
        table = open_table(Path(path))
        known = [row for row in table.rows if row.slide in case_of]
        folds = fold_columns(Path(path), known, table.columns, fold_prefix)
    return Table(
        slide_ids=slides,
        case_ids=cases,
        outcomes=[outcome for outcome, _, _ in found],
        truth=[_spread(slides, rows.slide_ids, values) for _, rows, values in found],
        folds=folds,
        unlabelled=sorted({s for _, rows, _ in found for s in rows.unlabelled} - set(slides)),
        notes=notes,
    )


def _read_one(
    path: Path, spec: str, classes: Sequence[str], fold_prefix: str, bins: int
) -> tuple[Outcome, Any, np.ndarray]:
    """The outcome, what its reader returned, and its truth (n, w)."""
    kind, colon, column = spec.strip().partition(":")
    if not colon:
        kind, column = "classes", kind
    if kind == "classes":
        rows = read_labels(path, column, fold_prefix, classes)
        task = Task(column, kind, tuple(rows.classes))
        return Classes(task), rows, rows.labels[:, None].astype(float)
    if kind == "labels":
        rows = read_multilabel(path, column.split("+"), fold_prefix)
        return Labels(Task(column, kind, tuple(rows.names))), rows, rows.values
    if kind == "number":
        rows = read_number(path, column, fold_prefix)
        return Number(Task(column, kind)), rows, rows.values[:, None]
    if kind in ("nll", "cox"):
        rows = read_survival(path, column, fold_prefix=fold_prefix)
        task = Task(rows.task or "survival", kind, bins=bins)
        return TimeToEvent(task), rows, np.stack([rows.time, rows.event], 1).astype(float)
    raise UserError(f"--task {spec}: unknown kind {kind!r}", f"Expected one of {', '.join(KINDS)}")


def _spread(slides: list[str], own: list[str], values: np.ndarray) -> np.ndarray:
    """(n, w) of all slides from those that have it; NaN elsewhere."""
    row_of = {slide: i for i, slide in enumerate(slides)}
    spread = np.full((len(slides), values.shape[1]), np.nan)
    spread[[row_of[slide] for slide in own]] = values
    return spread
