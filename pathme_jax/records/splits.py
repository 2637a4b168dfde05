"""The split files of other tools, as fold columns: who trains and who is tested, fixed once for every method.

    splits_<k>.csv         CLAM        columns train, val, test of slide ids; one file a fold
    splits_<k>_bool.csv    CLAM        a row a slide, True in one of these columns
    k=all.tsv and others   Patho-Bench, PatHME, LRMIL    a row a slide or case, fold_<k> columns of train, val, test
    splits.json            STAMP       lists of ids under train…, val…, test…; one or several folds

What a file holds is told by its content. Ids are those of slides, with or without a suffix, or of cases.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pathme_jax.errors import UserError
from pathme_jax.files import listed
from pathme_jax.records import tables

UNDERSTOOD = (
    "Understood: CLAM's splits_0.csv, splits_1.csv, … (a folder or one file, also _bool); a CSV or TSV with a case or "
    "slide column and fold_0, fold_1, … (Patho-Bench's k=all.tsv, PatHME, LRMIL); JSON with lists of ids under train "
    "and test (STAMP)"
)
SIDES = ("train", "val", "test")
TRUE, FALSE = {"true", "1", "1.0"}, {"false", "0", "0.0"} | tables.MISSING


@dataclasses.dataclass
class _Splits:
    """What a file says.

    Attributes:
        tool: whose format it is, in words.
        of_cases: its ids are named as those of cases; other ids may be of either.
        folds: name → pairs (id, part); the parts are never blank.
    """

    tool: str
    of_cases: bool
    folds: dict[str, list[tuple[str, str]]]


def read_splits(
    path: str | Path, slide_ids: list[str], case_ids: list[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Folds from a file, or a folder, of splits.

    Args:
        slide_ids, case_ids: (n,) of the labelled slides.

    Returns:
        folds: name → (n,) "train", "val", "test" or "" (in no part), as `records.labels.Labels.folds`.
        notes: the format, and which slides are missing on either side.

    Raises:
        UserError: not readable or not recognised, none of its ids known, or a slide or patient in two parts of a fold.
    """
    path = Path(path)
    splits = _folder(path) if path.is_dir() else _file(path)
    slides = [tables.stem(slide) for slide in slide_ids]
    ids = {id for fold in splits.folds.values() for id, _ in fold}
    rows = _rows_of(path, ids, slides, case_ids, splits.of_cases)
    folds = {
        name: _parts(path, name, pairs, rows, case_ids) for name, pairs in splits.folds.items()
    }
    tables.no_leak(path, folds, case_ids)
    notes = [f"{splits.tool}, {len(folds)} fold{'s' * (len(folds) > 1)}"]
    unknown = sorted(ids - rows.keys())
    if unknown:
        notes.append(f"{len(unknown)} ids of the splits have no label: {_some(unknown)}")
    absent = [s for s, *parts in zip(slide_ids, *folds.values(), strict=True) if not any(parts)]
    if absent:
        notes.append(f"{len(absent)} labelled slides are in no split: {_some(absent)}")
    return folds, notes


# --- what is in a file or folder


def _folder(path: Path) -> _Splits:
    """CLAM's numbered files, Patho-Bench's table of all cases, or the only file there is."""
    files = [f for suffix in (".csv", ".tsv", ".json") for f in listed(path, suffix)]
    numbered = [f for f in files if re.fullmatch(r"splits_\d+(_bool)?\.csv", f.name)]
    if numbered:
        return _clam(numbered)
    chosen = [f for f in files if f.name == "k=all.tsv"] or files
    if len(chosen) != 1:
        held = f"{_some([f.name for f in chosen])}: give one of them" if chosen else "no split file"
        raise UserError(f"{path}: holds {held}", UNDERSTOOD)
    return _file(chosen[0])


def _clam(files: list[Path]) -> _Splits:
    """One fold a number; where a fold is there as lists and as True and False, the two must agree."""
    folds: dict[str, list[tuple[str, str]]] = {}
    files = sorted(files, key=lambda f: (int(f.stem.split("_")[1]), f.stem))
    for file in files:
        read = _file(file)
        if list(read.folds) != [_fold_name(file)]:
            raise UserError(f"{file}: no columns train and test", UNDERSTOOD)
        folds.setdefault(_fold_name(file), []).extend(read.folds[_fold_name(file)])
    return _Splits("CLAM splits", False, folds)


def _file(path: Path) -> _Splits:
    if path.suffix.lower() == ".json":
        return _json(path)
    try:
        rows, columns = tables.read_rows(path)
    except UserError as error:
        raise UserError(error.problem, UNDERSTOOD) from error
    sides = {c: tables.PARTS[c.lower()] for c in columns if c.lower() in tables.PARTS}
    if {"train", "test"} <= set(sides.values()) and not path.stem.endswith("_descriptor"):
        said = {row[column].lower() for row in rows for column in sides}
        read = _marked if said <= TRUE | FALSE else _listed
        return _Splits("CLAM splits", False, {_fold_name(path): read(rows, columns, sides)})
    return _columns(path, rows, columns)


def _fold_name(path: Path) -> str:
    return path.stem.removesuffix("_bool")


def _listed(
    rows: list[dict[str, str]], columns: list[str], sides: dict[str, str]
) -> list[tuple[str, str]]:
    """A column of ids for each part; the columns are of different lengths."""
    return [
        (row[column], part)
        for column, part in sides.items()
        for row in rows
        if not tables.is_blank(row[column])
    ]


def _marked(
    rows: list[dict[str, str]], columns: list[str], sides: dict[str, str]
) -> list[tuple[str, str]]:
    """True or False in a column for each part; the ids are in the first other column."""
    ids = next((column for column in columns if column not in sides), columns[0])
    return [
        (row[ids], part)
        for column, part in sides.items()
        for row in rows
        if row[column].lower() in TRUE
    ]


def _columns(path: Path, rows: list[dict[str, str]], columns: list[str]) -> _Splits:
    """One or more rows a slide or case, and a column for each fold."""
    try:
        case, slide = tables.find_ids(path, columns, [])
    except UserError as error:
        raise UserError(error.problem, UNDERSTOOD) from error
    named = [
        tables.Row(row[slide or case], row[case] if case else "", row)
        for row in rows
        if not tables.is_blank(row[slide or case])
    ]
    found = tables.fold_columns(path, named, columns, "fold_")
    if not found or not named:
        raise UserError(f"{path}: no fold columns among {', '.join(columns)}", UNDERSTOOD)
    folds = {
        name: [(row.slide, part) for row, part in zip(named, parts, strict=True) if part]
        for name, parts in found.items()
    }
    tool = "Patho-Bench splits" if path.name.startswith("k=") else "fold columns"
    return _Splits("PatHME or LRMIL splits" if case == "P_ID" else tool, not slide, folds)


def _json(path: Path) -> _Splits:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})", UNDERSTOOD) from error
    folds = _json_folds(content)
    if not folds:
        raise UserError(f"{path}: no lists of ids under train and test", UNDERSTOOD)
    return _Splits("JSON splits", False, folds)


def _json_folds(content: Any) -> dict[str, list[tuple[str, str]]]:
    """A fold, a list of folds, or a dictionary of folds, itself under "splits" or "folds" or not; {} if it is none."""
    if isinstance(content, dict):
        for key in ("splits", "folds"):
            content = content.get(key, content) if isinstance(content, dict) else content
    if isinstance(content, dict) and _json_fold(content):
        content = [content]
    if isinstance(content, list):
        content = {f"fold_{k}": fold for k, fold in enumerate(content)}
    if not isinstance(content, dict):
        return {}
    folds = {name: _json_fold(fold) for name, fold in content.items()}
    return folds if all(folds.values()) else {}


def _json_fold(fold: Any) -> list[tuple[str, str]]:
    """Pairs of a dictionary with lists under `train`, `test_patients` and the like; [] if it is none."""
    if not isinstance(fold, dict):
        return []
    sides = {key: tables.PARTS.get(key.lower().split("_")[0]) for key in fold}
    lists = {key: fold[key] for key, part in sides.items() if part}
    ids = [id for values in lists.values() if isinstance(values, list) for id in values]
    good = all(isinstance(values, list) for values in lists.values()) and all(
        isinstance(id, str) or type(id) is int for id in ids
    )
    if not good or not {"train", "test"} <= set(sides.values()):
        return []
    return [
        (str(id).strip(), part)
        for key, part in sides.items()
        if part
        for id in lists[key]
        if not tables.is_blank(str(id).strip())
    ]


# --- whose it is


def _rows_of(
    path: Path, ids: set[str], slides: list[str], cases: list[str], of_cases: bool
) -> dict[str, list[int]]:
    """Id of the file → its rows among the labels; ids without any are left out.

    The ids are taken for those of slides or of cases, whichever more of them are: where both are numbers, one id may
    name a slide of one patient and another patient.
    """
    by_case, by_slide = _where(ids, cases), _where(ids, slides)
    first, second = (by_case, by_slide) if of_cases else (by_slide, by_case)
    found = max(first, second, key=len)
    if not found:
        raise UserError(
            f"{path}: none of its {len(ids)} ids is a labelled slide or case; the first is "
            f"{min(ids, default='')!r}, a labelled slide {min(slides, default='')!r}",
            "Give the splits of the slides in the label table",
        )
    return found


def _where(ids: Iterable[str], names: list[str]) -> dict[str, list[int]]:
    """pandas writes id 12 as 12.0 where its column is not full."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    forms = {id: (id, tables.stem(id), id.removesuffix(".0")) for id in ids}
    known = {id: next((f for f in forms[id] if f in rows), None) for id in ids}
    return {id: rows[form] for id, form in known.items() if form is not None}


def _parts(
    path: Path,
    fold: str,
    pairs: list[tuple[str, str]],
    rows: dict[str, list[int]],
    cases: list[str],
) -> list[str]:
    """(n,) part of each labelled slide."""
    parts = [""] * len(cases)
    said: dict[int | str, str] = {}
    for id, part in pairs:
        mine = rows.get(id, [])
        key = mine[0] if mine else tables.stem(id)  # a slide is one, however its id is written
        if said.setdefault(key, part) != part:
            patient = f" of patient {cases[mine[0]]!r}" if mine else ""
            raise UserError(
                f"{path}: {fold}: {id!r}{patient} is in both {said[key]} and {part}",
                "Put it in one part of every fold",
            )
        for row in mine:
            parts[row] = part
    return parts


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
