"""Who is trained on and who is tested: patient-grouped, stratified, and refused where a patient leaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from pathme_jax.errors import UserError

UNUSED, TRAIN, VALIDATION, TEST = 0, 1, 2, 3
_CODES = {"": UNUSED, "train": TRAIN, "val": VALIDATION, "test": TEST}
VALIDATE_FROM = 20  # training cases of the smallest class; a fifth of fewer is too few to stop on


def stratified(
    cases: list[str], labels: np.ndarray, classes: list[str], folds: int, seed: int
) -> np.ndarray:
    """(f, n) parts of n bags: every case is tested once, every fold trains and tests every class.

    The cases of a class are dealt to the folds in a random order, each class going on where the one before
    stopped: a class, and the whole, differ by at most one case between folds. Where there is one class only by its
    name, nothing is stratified. f is `folds`, or the number of
    cases of the smallest class if that is less. Where every class has `VALIDATE_FROM` training cases, a fifth
    of a fold's training cases becomes its validation part. Cases whose label is unknown, -1, are dealt with the
    largest class.

    Raises:
        UserError: fewer than two classes, or a class with one case.
    """
    known = labels[labels >= 0]
    labels = np.where(labels >= 0, labels, np.bincount(known).argmax() if len(known) else 0)
    label_of = dict(sorted(zip(cases, labels.tolist(), strict=True)))
    counts = {name: list(label_of.values()).count(i) for i, name in enumerate(classes)}
    present = {name: count for name, count in counts.items() if count}
    if len(present) < min(2, len(classes)):
        raise UserError(
            f"only one class, {next(iter(present))!r}, among the {len(label_of)} cases with features",
            "Give at least two cases of at least two classes",
        )
    rarest = min(present, key=lambda name: present[name])
    if present[rarest] < 2:
        raise UserError(
            f"class {rarest!r} has 1 case with features: cannot cross-validate",
            "Give at least two cases of every class, or blank that label",
        )
    k = min(folds, present[rarest])
    fold_of = _deal(label_of, k, np.random.default_rng([seed, 1]))
    tested = np.array([fold_of[case] for case in cases])
    parts = np.where(tested == np.arange(k)[:, None], TEST, TRAIN).astype(np.int8)
    for f in range(k):
        rest = {case: label for case, label in label_of.items() if fold_of[case] != f}
        smallest = min(list(rest.values()).count(label) for label in set(rest.values()))
        if smallest >= VALIDATE_FROM:
            fifth = _deal(rest, 5, np.random.default_rng([seed, 2, f]))
            parts[f, [fifth.get(case) == 0 for case in cases]] = VALIDATION
    return parts


def _deal(label_of: dict[str, int], k: int, rng: np.random.Generator) -> dict[str, int]:
    """case → hand, dealing the cases of one class after another to k hands in turn."""
    order = [
        case
        for label in sorted(set(label_of.values()))
        for case in rng.permutation([c for c in label_of if label_of[c] == label]).tolist()
    ]
    return {case: turn % k for turn, case in enumerate(order)}


class Parts(Protocol):
    """A label table with the user's folds: name → (n,) "train", "val", "test" or ""; see `mil.table.Table`."""

    @property
    def case_ids(self) -> list[str]: ...
    @property
    def folds(self) -> dict[str, list[str]]: ...


def given(
    table: Parts, rows: list[int], lacks: Callable[[np.ndarray], str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The user's fold columns: of each that can be used its (n,) parts, and those left out, with the reason.

    Args:
        rows: (n,) row of each bag in the table.
        lacks: what training bags (n,) bool lack to be learned from, or "".

    Raises:
        UserError: a case is on two sides of one fold, or no fold can be used.
    """
    parts: dict[str, np.ndarray] = {}
    skipped = []
    for name, values in table.folds.items():
        side: dict[str, str] = {}
        for case, value in zip(table.case_ids, values, strict=True):
            if side.setdefault(case, value) != value:
                raise UserError(
                    f"{name}: patient {case!r} is in both {side[case] or 'no part'} and "
                    f"{value or 'no part'}",
                    "Put all slides of a patient on one side of every fold",
                )
        part = np.array([_CODES[values[row]] for row in rows], np.int8)
        missing = lacks(part == TRAIN)
        if not (part == TEST).any():
            skipped.append(f"{name}: no slide with features is tested")
        elif missing:
            skipped.append(f"{name}: {missing} to train on")
        else:
            parts[name] = part
    if not parts:
        raise UserError(
            f"no fold of {', '.join(table.folds)} can be used; {skipped[0]}",
            "Mark slides that differ in what is to be learned as train and some as test, or pass "
            "--fold-column-prefix ''",
        )
    return parts, skipped
