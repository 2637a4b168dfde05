"""The label table: which slide belongs to which case, what is to be predicted, and the user's own folds.

One row per slide: `case_id,slide_id,<task columns>[,fold_0,fold_1,…]`, see `records.tables`. A column is read as
classes, as a number, or several columns as labels that may hold together; `records.survival` reads times and events.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.records import tables

YES = {"1", "1.0", "yes", "true", "positive", "pos", "mut", "mutated", "mutant"}
NO = {"0", "0.0", "no", "false", "negative", "neg", "wt", "wildtype", "wild-type"}


@dataclasses.dataclass
class Labels:
    """The slides that have a label for one task, in the order of their ids.

    Attributes:
        task: the column.
        classes: names of the c classes, numbers in numeric order, text in alphabetical order.
        slide_ids, case_ids: (n,) text.
        labels: (n,) int, index into `classes`.
        folds: the user's fold columns: name → (n,) "train", "val", "test" or "" (unused).
        unlabelled: slides of the table whose label is blank.
        notes: what was renamed or assumed on reading, for the user to see.
    """

    task: str
    classes: list[str]
    slide_ids: list[str]
    case_ids: list[str]
    labels: np.ndarray
    folds: dict[str, list[str]]
    unlabelled: list[str]
    notes: list[str]


@dataclasses.dataclass
class Numbers:
    """The slides that have a number, as `Labels`; all slides of a case share one.

    Attributes:
        values: (n,) float, finite, in the table's unit.
    """

    task: str
    slide_ids: list[str]
    case_ids: list[str]
    values: np.ndarray
    folds: dict[str, list[str]]
    unlabelled: list[str]
    notes: list[str]


@dataclasses.dataclass
class MultiLabel:
    """The slides that have at least one of l labels, as `Labels`; all slides of a case have the same.

    Attributes:
        task: the names, joined by +.
        names: (l,) text, the columns.
        values: (n, l) float, 1 holds, 0 does not, NaN unknown.
    """

    task: str
    names: list[str]
    slide_ids: list[str]
    case_ids: list[str]
    values: np.ndarray
    folds: dict[str, list[str]]
    unlabelled: list[str]
    notes: list[str]


def read_labels(
    path: str | Path, task: str, fold_prefix: str = "fold_", classes: Sequence[str] = ()
) -> Labels:
    """Reads one column of a label table as classes.

    Args:
        path: the table.
        task: its column with the class.
        fold_prefix: see `tables.fold_columns`; "" ignores the table's folds.
        classes: the classes in the order wanted; by default all that the column holds.

    Raises:
        UserError: see `tables.open_table` and `Table.common`; no such column, one class only, two labels in one case,
            or a label that is none of `classes`.
    """
    table = tables.open_table(path)
    table.need([task])
    known = table.known([task])
    values = [row.cells[task] for row in known]
    # 1, 1.0 and 01 are one class where every class is a number.
    if all(tables.number(name) is not None for name in classes or values):
        values, classes = _alike(values), _alike(classes)
    tables.one_per_case(table, known, [task], [[value] for value in values])
    names = list(dict.fromkeys(classes)) or sorted(set(values), key=_in_order)
    for row, value in zip(known, values, strict=True):
        if value not in names:
            raise UserError(
                f"{table.path}: {task} of slide {row.slide!r} is {value!r}, an unknown label",
                f"Expected one of {', '.join(names)}, or blank",
            )
    if len(names) < 2:
        raise UserError(
            f"{table.path}: only one class, {names[0]!r}, in column {task!r}",
            "Give slides of at least two classes",
        )
    table.notes += [f"no slide is {name!r}" for name in names if name not in values]
    return Labels(
        task=task,
        classes=names,
        labels=np.array([names.index(value) for value in values]),
        **table.common(known, fold_prefix),
    )


def read_number(path: str | Path, column: str, fold_prefix: str = "fold_") -> Numbers:
    """Reads one column of a label table as a number.

    Args:
        path, fold_prefix: as in `read_labels`.
        column: decimal numbers with a point, or blank.

    Raises:
        UserError: see `tables.open_table` and `Table.common`; no such column, a cell that is no finite number, two
            numbers in one case, or the same number everywhere.
    """
    table = tables.open_table(path)
    table.need([column])
    known = table.known([column])
    values = np.array([_value(table, row, column) for row in known])
    tables.one_per_case(table, known, [column], [[value] for value in values.tolist()])
    if np.all(values == values[0]):
        raise UserError(
            f"{table.path}: column {column!r} is {values[0]:g} in every row",
            "Give a column that varies",
        )
    return Numbers(task=column, values=values, **table.common(known, fold_prefix))


def read_multilabel(
    path: str | Path, columns: Sequence[str], fold_prefix: str = "fold_"
) -> MultiLabel:
    """Reads several columns of a label table as labels that may hold together.

    Args:
        path, fold_prefix: as in `read_labels`.
        columns: each 0 or 1, or words for them (`NO`, `YES`), or blank where it is not known.

    Raises:
        UserError: see `tables.open_table` and `Table.common`; no such column, a column twice, a cell that is neither
            0, 1 nor blank, slides of one case that differ, or a column that is not both 0 and 1 somewhere.
    """
    names = list(columns)
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"labels {'+'.join(names) or 'without a name'}", "Name one or more columns, each once"
        )
    table = tables.open_table(path)
    table.need(names)
    known = table.known(names)
    values = [[_holds(table, row, name) for name in names] for row in known]
    tables.one_per_case(table, known, names, values)
    for name, column in zip(names, zip(*values, strict=True), strict=True):
        found = sorted({value for value in column if value is not None})
        if len(found) < 2:
            held = f"{found[0]} wherever known" if found else "blank in every row"
            raise UserError(
                f"{table.path}: label {name!r} is {held}",
                "Leave it out: nothing can be learnt or judged without both 0 and 1",
            )
    array = np.array(values, float)  # None becomes NaN
    return MultiLabel("+".join(names), names, values=array, **table.common(known, fold_prefix))


def _alike(values: Sequence[str]) -> list[str]:
    """Numbers in one spelling; text stays."""
    found = [(value, tables.number(value)) for value in values]
    return [value if x is None else f"{x + 0.0:.15g}" for value, x in found]


def _in_order(name: str) -> tuple[bool, float, str]:
    """Numbers first and by size, then text."""
    value = tables.number(name)
    return value is None, value or 0.0, name


def _value(table: tables.Table, row: tables.Row, column: str) -> float:
    cell = row.cells[column]
    value = tables.number(cell)
    if value is None:
        comma = re.fullmatch(r"[+-]?\d*,\d+", cell)
        raise UserError(
            f"{table.path}: {column} of slide {row.slide!r} is {cell!r}",
            f"Write the number with a decimal point, {cell.replace(',', '.')}"
            if comma
            else "Expected a finite number, or blank",
        )
    return value


def _holds(table: tables.Table, row: tables.Row, column: str) -> int | None:
    cell = row.cells[column].lower()
    if tables.is_blank(cell):
        return None
    if cell not in YES | NO:
        raise UserError(
            f"{table.path}: {column} of slide {row.slide!r} is {row.cells[column]!r}",
            f"Expected blank, or one of {', '.join(sorted(NO))}; {', '.join(sorted(YES))}",
        )
    return int(cell in YES)
