"""What a slide-level run left in its folder, read into arrays.

<run>/run.json history.csv attention/<slide>.h5 <task>/metrics.json predictions.csv cases.csv
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.files import read_csv, read_json

KINDS = ("classes", "labels", "number", "nll", "cox")
Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Result:
    """One task of a run.

    Attributes:
        folder: of the task; the run's is its parent.
        metrics: metrics.json.
        cases: rows of cases.csv, a row a case and fold that tested it.
        slides: rows of predictions.csv, a row a bag and fold.
    """

    folder: Path
    metrics: dict[str, Any]
    cases: list[Row]
    slides: list[Row]

    @property
    def kind(self) -> str:
        return self.metrics["kind"]

    @property
    def measure(self) -> str:
        """Name of the primary measure."""
        return self.metrics["measure"]

    @property
    def names(self) -> list[str]:
        """Of the classes or labels."""
        return self.metrics["classes"]

    def value(self, name: str) -> float | None:
        """A further measure of the head, None where it is not there."""
        return self.metrics["rows"]["head"].get("measures", {}).get(name, {}).get("value")


def task_folders(run: Path) -> list[Path]:
    """Folders of the tasks of a run, by name.

    Raises:
        UserError: there is none.
    """
    found = sorted(path.parent for path in Path(run).glob("*/metrics.json"))
    if not found:
        raise UserError(
            f"{run}: no <task>/metrics.json in it",
            "Give the folder that `python -m pathme_jax.mil_train` named at its end",
        )
    return found


def read(folder: Path) -> Result:
    """One task's folder.

    Raises:
        UserError: a file is missing or not what a run writes.
    """
    folder = Path(folder)
    cure = "Give the folder of a finished run, or train it again"
    try:
        metrics = read_json(folder / "metrics.json")
        cases, slides = (read_csv(folder / name) for name in ("cases.csv", "predictions.csv"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}", cure) from error
    if metrics.get("kind") not in KINDS or "head" not in metrics.get("rows", {}):
        raise UserError(
            f"{folder / 'metrics.json'}: kind is {metrics.get('kind')!r}, expected one of "
            f"{', '.join(KINDS)}, with a row 'head'",
            cure,
        )
    return Result(folder, metrics, cases, slides)


def numbers(rows: list[Row], column: str) -> np.ndarray:
    """(n,) a column as numbers, NaN where it is blank."""
    return np.array([float(row[column]) if row.get(column) else np.nan for row in rows])


def matrix(rows: list[Row], prefix: str, names: list[str]) -> np.ndarray:
    """(n, c) the columns <prefix><name>."""
    return np.stack([numbers(rows, prefix + name) for name in names], 1)


def class_of(rows: list[Row], names: list[str]) -> np.ndarray:
    """(n,) index of each row's label."""
    return np.array([names.index(row["label"]) for row in rows], int)


def high_risk(rows: list[Row]) -> np.ndarray:
    """(n,) bool: above the median risk of its fold, whose risks alone are comparable."""
    risk, fold = numbers(rows, "risk"), numbers(rows, "fold")
    high = np.zeros(len(rows), bool)
    for f in np.unique(fold):
        high[fold == f] = risk[fold == f] > np.median(risk[fold == f])
    return high


def precision_recall(score: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at every distinct score, the highest first; the steps' area is the average precision.

    score: (n,); positive: (n,) bool. NaN without a positive.
    """
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    hits = np.cumsum(positive[order])[last]
    if not positive.any():
        return np.full(len(last), np.nan), np.full(len(last), np.nan)
    return hits / positive.sum(), hits / (last + 1)
