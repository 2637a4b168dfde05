"""Bags: the instances of a slide, or of all slides of a case; read, joined to their parents, and padded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.records.features import SPATIAL, Bag, read_features
from pathme_jax.records.labels import Labels


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


def load(features: Path, labels: Labels, parents: Path | None = None) -> Cohort:
    """Reads the feature files of all labelled slides, each instance joined to its parent's feature if asked.

    Raises:
        UserError: a folder without feature files, no slide left, or features of different widths.
    """
    for folder in filter(None, (features, parents)):
        if not any(folder.glob("*.h5")):
            raise UserError(
                f"{folder}: no feature files (*.h5)",
                "Give the folder `python -m pathme_jax.extract` wrote",
            )
    cohort = Cohort([], [], 0)
    for slide_id in labels.slide_ids:
        try:
            slide = _read(features, slide_id)
            if parents is not None:
                before = len(slide.features)
                slide = with_parents(slide, _read(parents, slide_id))
                cohort.orphans += before - len(slide.features)
            if not len(slide.features):
                raise UserError("no instances", "The slide has no usable tissue: nothing to do")
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
        label: index of its class.
        row: of its first slide in the label table.
    """

    case_id: str
    label: int
    row: int
    slides: list[Bag]

    @property
    def slide_id(self) -> str:
        return ";".join(slide.slide_id for slide in self.slides)

    @property
    def features(self) -> np.ndarray:
        """(m, d)"""
        return np.concatenate([slide.features for slide in self.slides])


def make_bags(slides: list[Bag], labels: Labels, by: str) -> list[MilBag]:
    """One bag per slide, or one per case where `by` is "case"."""
    bags: dict[str, MilBag] = {}
    for slide in slides:
        row = labels.slide_ids.index(slide.slide_id)
        case = labels.case_ids[row]
        key = case if by == "case" else slide.slide_id
        bags.setdefault(key, MilBag(case, int(labels.labels[row]), row, [])).slides.append(slide)
    return list(bags.values())


@dataclasses.dataclass
class Bucket:
    """Bags padded to one size.

    Attributes:
        index: (b,) which bags.
        features: (b, m, d) float32, zero where padded.
        mask: (b, m) bool, True where there is an instance.
    """

    index: np.ndarray
    features: np.ndarray
    mask: np.ndarray


def pack(bags: list[np.ndarray], max_instances: int | None = None, seed: int = 0) -> list[Bucket]:
    """Pads bags of (m, d) features to few static sizes: the largest, and halves of it where bags are uneven.

    A bag of more than `max_instances` keeps a random sample of them, the same in every run.
    """
    if max_instances is not None:
        bags = [_sample(bag, max_instances, [seed, 3, i]) for i, bag in enumerate(bags)]
    lengths = np.array([len(bag) for bag in bags])
    size = _padded_sizes(lengths)
    return [_fill(np.flatnonzero(size == s), bags, s) for s in np.unique(size).tolist()]


def _sample(bag: np.ndarray, count: int, seed: list[int]) -> np.ndarray:
    if len(bag) <= count:
        return bag
    return bag[np.sort(np.random.default_rng(seed).choice(len(bag), count, replace=False))]


def _padded_sizes(lengths: np.ndarray) -> np.ndarray:
    """(b,) size each bag is padded to. Each further size is one more compilation, so stop at 4/3 waste."""
    top = -(-int(lengths.max()) // 32) * 32
    ladder = [top]
    while True:
        padded = np.min([np.where(lengths <= s, s, top) for s in ladder], axis=0)
        if padded.sum() <= 4 / 3 * lengths.sum() or len(ladder) == 6 or ladder[-1] <= 32:
            return padded
        ladder.append(-(-ladder[-1] // 64) * 32)


def _fill(index: np.ndarray, bags: list[np.ndarray], size: int) -> Bucket:
    features = np.zeros((len(index), size, bags[0].shape[1]), np.float32)
    mask = np.zeros((len(index), size), bool)
    for row, i in enumerate(index):
        features[row, : len(bags[i])] = bags[i]
        mask[row, : len(bags[i])] = True
    return Bucket(index, features, mask)
