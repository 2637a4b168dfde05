"""The label table: which slide belongs to which case, its class, and the user's own folds.

One row per slide: `case_id,slide_id,<task columns>[,fold_0,fold_1,…]`, comma or (`.tsv`) tab separated. The tables
of CLAM, Patho-Bench, STAMP, PatHME and LRMIL are read as they are; what was renamed is kept in `notes`.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np

from pathme_jax.errors import UserError

CASE_COLUMNS = ("case_id", "P_ID", "PATIENT", "patient", "patient_id")
SLIDE_COLUMNS = ("slide_id", "slide", "FILENAME")
MISSING = {"", "nan", "na", "n/a"}
SLIDE_SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm", ".h5", ".pt"}
PARTS = {"": "", "train": "train", "val": "val", "test": "test"} | {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "testing": "test",
}


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


def read_labels(path: str | Path, task: str, fold_prefix: str = "fold_") -> Labels:
    """Reads one task of a label table.

    Args:
        path: the table.
        task: its column with the class.
        fold_prefix: columns `<prefix><number>` hold train/val/test; a column named like the prefix without its
            underscore holds the number of the fold in which the slide is tested. "" ignores both.

    Raises:
        UserError: no such file or column, a slide twice, two labels in one case, a fold value not understood.
    """
    path = Path(path)
    rows, columns = read(path)
    notes: list[str] = []
    case = find(columns, CASE_COLUMNS, notes)
    slide = find(columns, SLIDE_COLUMNS, notes)
    if case is None and slide is None:
        raise UserError(
            f"{path}: neither a case nor a slide column among {', '.join(columns)}",
            f"Name them {CASE_COLUMNS[0]} and {SLIDE_COLUMNS[0]}",
        )
    if slide is None:
        notes.append(f"no slide column: slides are named by {case}")
    if case is None:
        notes.append(f"no case column: every {slide} is taken for a case of its own")
    if task not in columns:
        ids = {case, slide}
        raise UserError(
            f"{path}: no column {task!r}",
            f"Available: {', '.join(c for c in columns if c not in ids) or 'none'}",
        )
    for row in rows:
        row["/slide"] = stem(row[slide or case or ""])
        row["/case"] = row[case] if case else row["/slide"]
    rows = sorted((row for row in rows if row["/slide"]), key=lambda row: row["/slide"])
    no_duplicates(path, [row["/slide"] for row in rows])

    labelled = [row for row in rows if row[task].lower() not in MISSING]
    if not labelled:
        raise UserError(f"{path}: column {task!r} is blank in every row", "Fill in the labels")
    values = _numbers_alike([row[task] for row in labelled])
    _one_label_per_case(path, task, [row["/case"] for row in labelled], values)
    classes = sorted(set(values), key=lambda v: (not _is_number(v), _is_number(v) and float(v), v))
    return Labels(
        task=task,
        classes=classes,
        slide_ids=[row["/slide"] for row in labelled],
        case_ids=[row["/case"] for row in labelled],
        labels=np.array([classes.index(value) for value in values]),
        folds=fold_columns(path, labelled, columns, fold_prefix),
        unlabelled=[row["/slide"] for row in rows if row[task].lower() in MISSING],
        notes=notes,
    )


def read(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            columns = [column.strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            # A short row leaves None, a long one a list under None.
            rows = [{c: (row[c] or "").strip() for c in columns} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read ({error})", "Expected a CSV table in UTF-8"
        ) from error
    if not rows:
        raise UserError(f"{path}: no rows", "Expected a header and one row per slide")
    return rows, columns


def find(columns: list[str], names: tuple[str, ...], notes: list[str]) -> str | None:
    found = next((name for name in names if name in columns), None)
    if found not in (None, names[0]):
        notes.append(f"column {found!r} read as {names[0]}")
    return found


def stem(slide: str) -> str:
    """`a.svs` is slide `a`; a dot that begins no known suffix belongs to the name (TCGA)."""
    return (
        slide[: -len(Path(slide).suffix)] if Path(slide).suffix.lower() in SLIDE_SUFFIXES else slide
    )


def no_duplicates(path: Path, slide_ids: list[str]) -> None:
    for first, second in itertools.pairwise(slide_ids):
        if first == second:
            raise UserError(
                f"{path}: slide {first!r} has more than one row", "Keep one row per slide"
            )


def _one_label_per_case(path: Path, task: str, cases: list[str], values: list[str]) -> None:
    seen: dict[str, str] = {}
    for case, value in zip(cases, values, strict=True):
        if seen.setdefault(case, value) != value:
            raise UserError(
                f"{path}: case {case!r} has {task} {seen[case]!r} on one slide and {value!r} on another",
                "Give all slides of a case one label, or give the slides different case ids",
            )


def _is_number(value: str) -> bool:
    try:
        return np.isfinite(float(value)).item()
    except ValueError:
        return False


def _numbers_alike(values: list[str]) -> list[str]:
    """1, 1.0 and 01 are one class where every label is a number."""
    return [f"{float(v):g}" for v in values] if all(map(_is_number, values)) else values


def fold_columns(
    path: Path, rows: list[dict[str, str]], columns: list[str], prefix: str
) -> dict[str, list[str]]:
    if not prefix:
        return {}
    numbered = [c for c in columns if re.fullmatch(re.escape(prefix) + r"\d+", c)]
    folds: dict[str, list[str]] = {}
    for column in sorted(numbered, key=lambda c: int(c[len(prefix) :])):
        values = [row[column].lower() for row in rows]
        for value, row in zip(values, rows, strict=True):
            if value not in PARTS:
                raise UserError(
                    f"{path}: {column} of slide {row['/slide']!r} is {value!r}",
                    "Expected train, val, test or blank",
                )
        folds[column] = [PARTS[value] for value in values]
    single = prefix.rstrip("_")
    if not folds and single in columns:
        values = [row[single] for row in rows]
        for value, row in zip(values, rows, strict=True):
            if not re.fullmatch(r"\d+", value):
                raise UserError(
                    f"{path}: {single} of slide {row['/slide']!r} is {value!r}",
                    "Expected the number of the fold in which it is tested, from 0",
                )
        for number in sorted({int(value) for value in values}):
            folds[f"{single} {number}"] = [
                "test" if int(value) == number else "train" for value in values
            ]
    return folds
