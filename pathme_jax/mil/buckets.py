"""Bags padded to few static sizes, so that few programs are compiled and little is padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from pathme_jax.mil.heads.common import Bag

WASTE = 1.05  # padded instances over real ones, at most
SIZES = 16  # each is one more compilation


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Bags of one padded size.

    Attributes:
        index: (b,) which bags.
        features: (b, m, d) float32, zero where padded.
        mask: (b, m) bool, True where there is an instance.
        cells: (b, m, 2) int32 row and column of each instance; zero where unknown.
    """

    index: np.ndarray
    features: np.ndarray
    mask: np.ndarray
    cells: np.ndarray

    def arrays(self) -> Bag:
        """All its bags, stacked."""
        stacked: Any = (self.features, self.mask, self.cells)  # NumPy's, until they are on a device
        return Bag(*stacked)


def pack(
    features: Sequence[np.ndarray],
    cells: Sequence[np.ndarray | None] | None = None,
    *,
    most: int | None = None,
    seed: int = 0,
) -> list[Bucket]:
    """Pads bags of (m, d) features to at most SIZES sizes.

    Args:
        cells: (m, 2) of each bag, or None where unknown.
        most: instances a bag keeps, drawn at random, the same in every run; None: all.
    """
    cells = cells or [None] * len(features)
    kept = [_sample(len(bag), most, [seed, 3, i]) for i, bag in enumerate(features)]
    lengths = np.array([len(rows) for rows in kept])
    size = padded_sizes(lengths)
    buckets = []
    for m in np.unique(size).tolist():
        index = np.flatnonzero(size == m)
        bucket = Bucket(
            index,
            np.zeros((len(index), m, features[0].shape[1]), np.float32),
            np.zeros((len(index), m), bool),
            np.zeros((len(index), m, 2), np.int32),
        )
        for row, i in enumerate(index.tolist()):
            n = lengths[i]
            bucket.features[row, :n] = features[i][kept[i]]
            bucket.mask[row, :n] = True
            at = cells[i]
            if at is not None:
                bucket.cells[row, :n] = at[kept[i]]
        buckets.append(bucket)
    return buckets


def _sample(count: int, most: int | None, seed: list[int]) -> np.ndarray:
    if most is None or count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def padded_sizes(lengths: np.ndarray) -> np.ndarray:
    """(n,) size each bag is padded to: the fewest sizes that keep the waste below WASTE, each placed where it
    saves most."""
    # Rounded up by less than a thirty-second: bags of nearly one size share it.
    step = 2 ** np.maximum(np.log2(np.maximum(lengths, 1)).astype(int) - 5, 0)
    own = np.maximum(-(-lengths // step) * step, 1)
    sizes = [int(own.max())]
    while True:
        padded = _padded(own, sizes)
        if padded.sum() <= WASTE * max(lengths.sum(), 1) or len(sizes) == SIZES:
            return padded
        others = np.setdiff1d(own, sizes)
        if not len(others):
            return padded
        sizes.append(int(min(others, key=lambda s: _padded(own, [*sizes, s]).sum())))


def _padded(own: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The least of `sizes` that is no smaller than each of `own`."""
    ladder = np.sort(sizes)
    return ladder[np.searchsorted(ladder, own)]


def waste(buckets: Sequence[Bucket]) -> float:
    """Padded instances over real ones."""
    return sum(b.mask.size for b in buckets) / max(sum(int(b.mask.sum()) for b in buckets), 1)
