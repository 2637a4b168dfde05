"""Bags: the instances of a slide, or of all slides of a case; read, and joined to their parents."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pathme_jax.errors import UserError
from pathme_jax.files import listed, read_csv
from pathme_jax.mil.table import Table
from pathme_jax.records.features import SPATIAL, Bag, read_features

APART = 1000  # tiles between the slides of a case, which share no coordinates


@dataclasses.dataclass
class Cohort:
    """What was read.

    Attributes:
        slides: labelled slides with at least one instance, in the order of the labels.
        problems: rows `slide_id, reason, cure` of labelled slides left out.
        orphans: instances dropped because their parent is absent.
    """

    slides: list[Bag]
    problems: list[dict[str, str]]
    orphans: int


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """(m, d) features that are read each time an array is made of them."""

    read: Callable[[], np.ndarray]
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def load(
    features: Path, labels: Table, parents: Path | None = None, memory: int | None = None
) -> Cohort:
    """Reads the feature files of all labelled slides, each instance joined to its parent's feature if asked.

    Args:
        memory: bytes of features to keep; what comes after them is checked now, and read again when needed.
            None: all are kept.

    Raises:
        UserError: a folder without feature files, no slide left, or features of different widths.
    """
    for folder in filter(None, (features, parents)):
        if not listed(folder, ".h5"):
            raise UserError(
                f"{folder}: no feature files (*.h5)",
                "Give the folder `python -m pathme_jax.extract` wrote",
            )
    cohort = Cohort([], [], 0)
    kept = 0
    bar = tqdm(labels.slide_ids, desc="read features", unit="slide", leave=False, disable=None)
    for slide_id in bar:
        try:
            slide, orphans = _slide(features, parents, slide_id)
            cohort.orphans += orphans
            kept += slide.features.nbytes
            if memory is not None and kept > memory:
                read = functools.partial(_features_of, features, parents, slide_id)
                stored: Any = OnDisk(read, slide.features.shape)
                slide = dataclasses.replace(slide, features=stored)
            cohort.slides.append(slide)
        except UserError as error:
            cohort.problems.append(
                {"slide_id": slide_id, "reason": error.problem, "cure": error.cure}
            )
    if not cohort.slides:
        first = cohort.problems[0]
        raise UserError(
            f"{features}: none of the {len(labels.slide_ids)} labelled slides can be used; "
            f"{first['slide_id']}: {first['reason']}",
            "Check that slide_id in the labels and the names of the feature files agree",
        )
    _one_width(cohort.slides)
    return cohort


def _slide(features: Path, parents: Path | None, slide_id: str) -> tuple[Bag, int]:
    """One slide's instances, and how many were dropped for want of a parent."""
    slide, orphans = _read(features, slide_id), 0
    if parents is not None:
        before = len(slide.features)
        slide = with_parents(slide, _read(parents, slide_id))
        orphans = before - len(slide.features)
    if not len(slide.features):
        raise UserError("no instances", "The slide has no usable tissue: nothing to do")
    return slide, orphans


def _features_of(features: Path, parents: Path | None, slide_id: str) -> np.ndarray:
    return _slide(features, parents, slide_id)[0].features


def _read(folder: Path, slide_id: str) -> Bag:
    path = folder / f"{slide_id}.h5"
    if not path.exists():
        raise UserError(f"no features in {folder.name}", "See the errors of tiling and extraction")
    return read_features(path)


def _one_width(slides: list[Bag]) -> None:
    first = slides[0]
    for slide in slides:
        if slide.features.shape[1] != first.features.shape[1]:
            raise UserError(
                f"features of {first.slide_id} are {first.features.shape[1]} wide, "
                f"those of {slide.slide_id} {slide.features.shape[1]}",
                "Extract all slides with one encoder into one folder",
            )


def with_parents(child: Bag, parent: Bag) -> Bag:
    """The child's spatial instances, each with the feature of the 4 × coarser tile it lies in.

    (m, d) and (m', d') → at most (m, d + d'); the parent of grid cell (row, column) is (row // 4, column // 4).

    Raises:
        UserError: no grid in either file, or their µm/px are not 1 : 4.
    """
    if child.grid is None or parent.grid is None:
        raise UserError(
            f"{child.slide_id}: features without `grid` cannot be joined to their parents",
            "Extract both magnifications with pathme_jax",
        )
    fine, coarse = child.attrs.get("mpp"), parent.attrs.get("mpp")
    if fine and coarse and not np.isclose(4 * fine, coarse):
        raise UserError(
            f"{child.slide_id}: parents at {coarse} µm/px, expected {4 * fine} (4 × {fine})",
            "Give the parent features of the magnification four times coarser",
        )
    row_of = {
        tuple(cell): i for i, cell in enumerate(parent.grid.tolist()) if parent.kind[i] == SPATIAL
    }
    found = np.array([row_of.get(tuple(cell), -1) for cell in (child.grid // 4).tolist()], int)
    keep = (found >= 0) & (child.kind == SPATIAL)
    joined = np.concatenate([child.features[keep], parent.features[found[keep]]], axis=1)
    return Bag(
        child.slide_id, joined, child.coords[keep], child.grid[keep], child.kind[keep], child.attrs
    )


@dataclasses.dataclass
class MilBag:
    """A slide, or all slides of a case.

    Attributes:
        row: of its first slide in the label table.
    """

    case_id: str
    row: int
    slides: list[Bag]

    @property
    def slide_id(self) -> str:
        return ";".join(slide.slide_id for slide in self.slides)

    @property
    def features(self) -> np.ndarray | OnDisk:
        """(m, d)"""
        if len(self.slides) == 1:
            return self.slides[0].features
        parts = [slide.features for slide in self.slides]
        shape = (sum(map(len, parts)), parts[0].shape[1])
        return OnDisk(lambda: np.concatenate([np.asarray(part) for part in parts]), shape)

    @property
    def cells(self) -> np.ndarray:
        """(m, 2) row and column of each instance; slides of a case lie side by side, far apart; zero where
        unknown."""
        grids, right = [], 0
        for slide in self.slides:
            grid = (
                np.zeros((len(slide.features), 2), np.int32) if slide.grid is None else slide.grid
            )
            grids.append(grid + np.array([0, right], np.int32))
            right += int(grid[:, 1].max(initial=0)) + APART
        return np.concatenate(grids)


def make_bags(slides: list[Bag], table: Table, by: str) -> list[MilBag]:
    """One bag per slide, or one per case where `by` is "case"."""
    row_of = {slide_id: row for row, slide_id in enumerate(table.slide_ids)}
    bags: dict[str, MilBag] = {}
    for slide in slides:
        row = row_of[slide.slide_id]
        case = table.case_ids[row]
        key = case if by == "case" else slide.slide_id
        bags.setdefault(key, MilBag(case, row, [])).slides.append(slide)
    return list(bags.values())


def read_colour(path: Path, bags: list[MilBag]) -> np.ndarray:
    """(n, 3) mean colour of each bag, from a CSV `slide_id,r,g,b`.

    Raises:
        UserError: a slide is not in it, or a value is not a number.
    """
    try:
        rows = {row["slide_id"]: [float(row[c]) for c in "rgb"] for row in read_csv(path)}
        return np.array([np.mean([rows[s.slide_id] for s in bag.slides], axis=0) for bag in bags])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: no mean colour ({error!r})",
            "Expected a CSV slide_id,r,g,b with a row for every labelled slide",
        ) from error
