"""What every label table has in common: one row a slide, its case, and the user's own folds.

Comma, tab or semicolon separated, UTF-8 with or without a byte order mark. The case and slide columns go by the names
that CLAM, Patho-Bench, STAMP, PatHME and LRMIL give them; what was renamed or assumed is kept in `notes`.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pathme_jax.errors import UserError

CASE_COLUMNS = ("case_id", "P_ID", "PATIENT", "patient", "patient_id")
SLIDE_COLUMNS = ("slide_id", "slide", "FILENAME")
MISSING = {"", "nan", "na", "n/a", "<na>", "#n/a"}
SLIDE_SUFFIXES = {"svs", "tif", "tiff", "ndpi", "mrxs", "scn", "bif", "dcm", "h5", "pt", "npy"}
PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


@dataclasses.dataclass
class Row:
    """One slide: its id without suffix, its case, and all cells by column."""

    slide: str
    case: str
    cells: dict[str, str]


@dataclasses.dataclass
class Table:
    """A table as it was read.

    Attributes:
        columns: all of them; ids: those of the case and the slide.
        rows: in the order of their slide ids, each slide once.
        notes: what was renamed, assumed or left out, for the user to see.
    """

    path: Path
    columns: list[str]
    ids: tuple[str, ...]
    rows: list[Row]
    notes: list[str]

    def need(self, columns: Iterable[str]) -> None:
        for column in columns:
            if column not in self.columns:
                others = ", ".join(c for c in self.columns if c not in self.ids)
                raise UserError(
                    f"{self.path}: no column {column!r}", f"Available: {others or 'none'}"
                )

    def known(self, columns: Sequence[str]) -> list[Row]:
        """The rows in which not all of these columns are blank.

        Raises:
            UserError: there is none, or one of them has no case.
        """
        rows = [row for row in self.rows if not all(map(is_blank, cells(row, columns)))]
        if not rows:
            names = ", ".join(map(repr, columns))
            raise UserError(f"{self.path}: column {names} is blank in every row", "Fill it in")
        for row in rows:
            if not row.case:
                raise UserError(
                    f"{self.path}: slide {row.slide!r} has no {self.ids[0]}",
                    "Fill it in: slides of one patient must be known to belong together",
                )
        return rows

    def common(self, known: list[Row], fold_prefix: str) -> dict[str, Any]:
        """The fields that all kinds of labels share.

        Raises:
            UserError: a fold value is not understood, or a patient is on two sides of one fold.
        """
        slides = {row.slide for row in known}
        cases = [row.case for row in known]
        folds = fold_columns(self.path, known, self.columns, fold_prefix)
        no_leak(self.path, folds, cases)
        return {
            "slide_ids": [row.slide for row in known],
            "case_ids": cases,
            "folds": folds,
            "unlabelled": [row.slide for row in self.rows if row.slide not in slides],
            "notes": self.notes,
        }


def cells(row: Row, columns: Iterable[str]) -> list[str]:
    return [row.cells[column] for column in columns]


def is_blank(cell: str) -> bool:
    return cell.lower() in MISSING


def open_table(path: str | Path) -> Table:
    """Reads a table with one row a slide.

    Raises:
        UserError: it cannot be read, has neither a case nor a slide column, or a slide twice.
    """
    path = Path(path)
    content, columns = read_rows(path)
    notes: list[str] = []
    case, slide = find_ids(path, columns, notes)
    if not slide:
        notes.append(f"no slide column: slides are named by {case}")
    if not case:
        notes.append(f"no case column: every {slide} is taken for a case of its own")
    named = [row for row in content if not is_blank(row[slide or case])]
    if not named:
        raise UserError(
            f"{path}: column {slide or case!r} is blank in every row", "Fill in the ids"
        )
    if len(named) < len(content):
        notes.append(f"{len(content) - len(named)} rows without {slide or case} are left out")
    rows = []
    for row in named:
        name = stem(row[slide or case])
        rows.append(Row(name, ("" if is_blank(row[case]) else row[case]) if case else name, row))
    rows.sort(key=lambda row: row.slide)
    for first, second in itertools.pairwise(rows):
        if first.slide == second.slide:
            raise UserError(
                f"{path}: slide {first.slide!r} has more than one row", "Keep one row per slide"
            )
    return Table(path, columns, tuple(filter(None, (case, slide))), rows, notes)


def read_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """Rows by column, all text stripped, rows without any text left out; and the columns.

    Raises:
        UserError: not a file, not UTF-8, not a table, no rows, or a column that is there twice.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            separator = "\t" if path.suffix.lower() == ".tsv" else max(",\t;", key=header.count)
            # Strict: a quote that is not closed would swallow all rows after it.
            reader = csv.reader(file, delimiter=separator, strict=True, skipinitialspace=True)
            lines = [[cell.strip() for cell in line] for line in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read ({error})", "Expected a CSV table in UTF-8, every quote closed"
        ) from error
    lines = [line for line in lines if any(line)]
    if len(lines) < 2:
        raise UserError(f"{path}: no rows", "Expected a header and one row per slide")
    columns = lines[0]
    for column in columns:
        if column and columns.count(column) > 1:
            raise UserError(f"{path}: column {column!r} is there twice", "Rename or remove one")
    short = [""] * len(columns)
    return [dict(zip(columns, line + short, strict=False)) for line in lines[1:]], columns


def find_ids(path: Path, columns: list[str], notes: list[str]) -> tuple[str, str]:
    """The case and the slide column, "" where there is none; what is renamed goes to `notes`.

    Raises:
        UserError: there is neither.
    """
    found = []
    for names in (CASE_COLUMNS, SLIDE_COLUMNS):
        found.append(next((name for name in names if name in columns), ""))
        if found[-1] not in ("", names[0]):
            notes.append(f"column {found[-1]!r} read as {names[0]}")
    if not any(found):
        raise UserError(
            f"{path}: neither a case nor a slide column among {', '.join(columns)}",
            f"Name them {CASE_COLUMNS[0]} and {SLIDE_COLUMNS[0]}",
        )
    return found[0], found[1]


def stem(slide: str) -> str:
    """`a.svs` is slide `a`; a dot that begins no known suffix belongs to the name (TCGA)."""
    name, _, suffix = slide.rpartition(".")
    return name if name and suffix.lower() in SLIDE_SUFFIXES else slide


def number(cell: str) -> float | None:
    """A finite decimal number, or None; stricter than `float`, which takes "1_0" and "infinity"."""
    value = float(cell) if NUMBER.fullmatch(cell) else math.inf
    return value if math.isfinite(value) else None


def one_per_case(
    table: Table, rows: list[Row], columns: Sequence[str], values: Sequence[Any]
) -> None:
    """Refuses slides of one case with different values.

    Args:
        columns: the name of each value of a row.
        values: one sequence a row, of what must agree: text, numbers.
    """
    first: dict[str, tuple[Row, Sequence[Any]]] = {}
    for row, mine in zip(rows, values, strict=True):
        other, theirs = first.setdefault(row.case, (row, mine))
        for column, a, b in zip(columns, theirs, mine, strict=True):
            if a != b:
                raise UserError(
                    f"{table.path}: case {row.case!r} has {column} {other.cells[column]!r} on slide "
                    f"{other.slide!r} and {row.cells[column]!r} on {row.slide!r}",
                    "Give all slides of a case one value, or give the slides different case ids",
                )


def fold_columns(
    path: Path, rows: list[Row], columns: list[str], prefix: str
) -> dict[str, list[str]]:
    """Fold → "train", "val", "test" or "" for each row.

    Args:
        prefix: columns `<prefix><number>` hold train/val/test; a column named like the prefix without its
            underscore holds the number of the fold in which the slide is tested. "" ignores both.

    Raises:
        UserError: a value that is none of these.
    """
    if not prefix:
        return {}
    numbered = [c for c in columns if re.fullmatch(re.escape(prefix) + r"\d+", c)]
    numbered.sort(key=lambda c: int(c[len(prefix) :]))
    single = prefix.rstrip("_")
    if numbered or single not in columns:
        return {column: [_part(path, row, column) for row in rows] for column in numbered}
    tested = [_fold_number(path, row, single) for row in rows]
    return {
        f"{single} {k}": ["" if t is None else "test" if t == k else "train" for t in tested]
        for k in sorted({t for t in tested if t is not None})
    }


def _part(path: Path, row: Row, column: str) -> str:
    value = row.cells[column]
    if is_blank(value):
        return ""
    if value.lower() not in PARTS:
        raise UserError(
            f"{path}: {column} of slide {row.slide!r} is {value!r}",
            "Expected train, val, test or blank",
        )
    return PARTS[value.lower()]


def _fold_number(path: Path, row: Row, column: str) -> int | None:
    value = row.cells[column]
    if is_blank(value):
        return None
    fold = number(value)  # pandas writes 1.0 where a row is blank
    if fold is None or fold < 0 or fold != int(fold):
        raise UserError(
            f"{path}: {column} of slide {row.slide!r} is {value!r}",
            "Expected the number of the fold in which it is tested, from 0, or blank",
        )
    return int(fold)


def no_leak(path: Path, folds: dict[str, list[str]], cases: list[str]) -> None:
    """Refuses a patient on two sides of one fold; a slide that a fold leaves out is on neither."""
    for fold, parts in folds.items():
        side: dict[str, str] = {}
        for case, part in zip(cases, parts, strict=True):
            if part and side.setdefault(case, part) != part:
                raise UserError(
                    f"{path}: {fold}: patient {case!r} is in both {side[case]} and {part}",
                    "Put all slides of a patient on one side of every fold",
                )
