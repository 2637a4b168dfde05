"""Two runs on the same patients and folds: what one gains over the other, and whether it was luck."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.evaluation import metrics
from pathme_jax.evaluation.auroc import weighted_auroc
from pathme_jax.evaluation.compare import paired_bootstrap, permutation_p
from pathme_jax.evaluation.intervals import bootstrap_weights
from pathme_jax.evaluation.survival import concordance
from pathme_jax.files import read_csv, read_json
from pathme_jax.mil.outcomes import Found, within_folds
from pathme_jax.mil.outputs import rounded


def compare(
    first: str | Path, second: str | Path, *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The gain of `second` over `first` in the primary measure of their task.

    Args:
        first, second: folders `<run>/<task>` of two runs.

    Returns:
        measure, first, second, difference; `interval` of the difference over patients, who are drawn for both at once,
        and its bootstrap_p; permutation_p that it does not matter whose scores a patient's are, which compares ranks
        within folds; cases.

    Raises:
        UserError: not two runs of one task on the same patients, truth and folds.
    """
    about, one, other = _read(first), _found(first), _found(second)
    if (about["task"], about["kind"]) != (_read(second)["task"], _read(second)["kind"]):
        raise UserError(
            f"{first} and {second} are of different tasks", "Compare two runs of one task"
        )
    _same(Path(first), Path(second), one, other)
    kind, truth, folds = about["kind"], one.truth, one.folds

    def measure(scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return measured(kind, scores, truth, folds, weights)

    strata = truth[:, -1] if kind in ("classes", "nll", "cox") else np.zeros(len(truth))
    weights = bootstrap_weights(one.cases, strata, draws, seed)
    each = [float(measure(found.scores)[0]) for found in (one, other)]
    drawn = paired_bootstrap(measure(one.scores, weights), measure(other.scores, weights))
    swapped = permutation_p(
        lambda scores: float(measure(scores)[0]),
        *(one.scores, other.scores, one.cases, folds),
        draws=draws,
        seed=seed,
    )
    return rounded(
        {
            "task": about["task"],
            "measure": about["measure"],
            "first": each[0],
            "second": each[1],
            "difference": each[1] - each[0],
            "interval": drawn["interval"],
            "bootstrap_p": drawn["p"],
            "permutation_p": swapped,
            "cases": len(np.unique(one.cases)),
        }
    )


def measured(
    kind: str, scores: np.ndarray, truth: np.ndarray, folds: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """(r,) primary measures of resamples, `weights` (r, n); None: (1,), each row once."""
    if kind == "classes":
        return weighted_auroc(scores, truth[:, 0].astype(int), folds, weights)
    if kind == "labels":
        known = np.where(np.isnan(truth), -1, truth)
        return metrics.multilabel(scores, known, folds, weights)["auroc"]
    if kind == "number":
        return within_folds(scores[:, 0], truth[:, 0], folds, weights)
    return np.atleast_1d(concordance(scores[:, 0], truth[:, 0], truth[:, 1], folds, weights))


def _read(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "metrics.json"
    if not path.exists():
        raise UserError(
            f"{folder}: no metrics.json", "Expected <run>/<task>, as mil_train leaves it"
        )
    return read_json(path)


def _found(folder: str | Path) -> Found:
    """cases.csv, in the order of fold and case."""
    about, rows = _read(folder), read_csv(Path(folder) / "cases.csv")
    rows.sort(key=lambda row: (int(row["fold"]), row["case_id"]))
    names = about["classes"]
    truth, scores = {
        "classes": (["label"], [f"score_{name}" for name in names]),
        "labels": ([f"label_{name}" for name in names], [f"score_{name}" for name in names]),
        "number": (["truth"], ["prediction"]),
    }.get(about["kind"], (["time_months", "event"], ["risk"]))

    def value(text: str) -> float:
        if about["kind"] == "classes":
            return float(names.index(text))
        return float(text) if text else np.nan

    return Found(
        scores=np.array([[float(row[c]) for c in scores] for row in rows]),
        truth=np.array([[value(row[c]) for c in truth] for row in rows]),
        folds=np.array([int(row["fold"]) for row in rows]),
        cases=np.array([row["case_id"] for row in rows]),
    )


def _same(first: Path, second: Path, one: Found, other: Found) -> None:
    ours, theirs = (
        set(zip(found.folds.tolist(), found.cases.tolist(), strict=True)) for found in (one, other)
    )
    for fold, case in sorted(ours ^ theirs)[:1]:
        where = first if (fold, case) in ours else second
        raise UserError(
            f"patient {case!r} is tested in fold {fold} of {where} only",
            "Compare runs on the same slides, labels, folds and seed",
        )
    differ = ~((one.truth == other.truth) | (np.isnan(one.truth) & np.isnan(other.truth))).all(1)
    if differ.any():
        raise UserError(
            f"patient {one.cases[differ][0]!r} has another truth in {second} than in {first}",
            "Compare runs on the same labels",
        )
