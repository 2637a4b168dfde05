"""Bags padded to few static sizes, so that few programs are compiled and little is padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pathme_jax.mil.heads.common import Bag

WASTE = 1.05  # padded instances over real ones, at most
SIZES = 16  # each is one more compilation,
SAVED = 1024  # which is not worth it for fewer instances than these
ENOUGH = 1.2  # unless padded ones are more than this of the real ones


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Bags of one padded size, read when they are asked for: they may lie in memory or on disk.

    Attributes:
        index: (b,) which bags.
        size: m, instances they are padded to.
        lengths: (b,) instances they have.
        width: d.
        read: row of the bucket to features (n, d) and cells (n, 2), or None where unknown.
    """

    index: np.ndarray
    size: int
    lengths: np.ndarray
    width: int
    read: Callable[[int], tuple[np.ndarray, np.ndarray | None]]

    @property
    def bag_bytes(self) -> int:
        """Of one padded bag's features."""
        return 4 * self.size * self.width

    def arrays(self, rows: Sequence[int] | np.ndarray | None = None) -> Bag:
        """Bags stacked, all or those of `rows`: features (b, m, d) float32 and zero where padded, mask (b, m),
        cells (b, m, 2) int32, row and column of each instance, zero where unknown."""
        wanted = range(len(self.index)) if rows is None else np.asarray(rows).tolist()
        features = np.zeros((len(wanted), self.size, self.width), np.float32)
        cells = np.zeros((len(wanted), self.size, 2), np.int32)
        read: dict[int, int] = {}
        for at, row in enumerate(wanted):
            if row in read:  # rows that fill up a run are its first bag again
                features[at], cells[at] = features[read[row]], cells[read[row]]
                continue
            read[row] = at
            own, where = self.read(row)
            features[at, : len(own)] = own
            if where is not None:
                cells[at, : len(own)] = where
        mask = np.arange(self.size) < self.lengths[np.asarray(wanted, int)][:, None]
        stacked: Any = (features, mask, cells)  # NumPy's, until they are on a device
        return Bag(*stacked)


def pack(
    features: Sequence[Any],
    cells: Sequence[np.ndarray | None] | None = None,
    *,
    most: int | None = None,
    seed: int = 0,
    multiple: int = 1,
    waste: float = WASTE,
    sizes: int = SIZES,
    saved: int = SAVED,
) -> list[Bucket]:
    """Plans bags of (m, d) features padded to few sizes.

    Args:
        features: arrays, or what turns into one by `np.asarray` and has its `shape`, such as `bags.OnDisk`.
        cells: (m, 2) of each bag, or None where unknown.
        most: instances a bag keeps, drawn at random, the same in every run; None: all.
        waste, sizes, saved: see `padded_sizes`.
        multiple: what sizes are multiples of: the devices the instances of a bag are spread over.
    """
    cells = cells or [None] * len(features)
    kept = [_sample(bag.shape[0], most, [seed, 3, i]) for i, bag in enumerate(features)]
    lengths = np.array([len(rows) for rows in kept])
    size = padded_sizes(lengths, waste, sizes, saved)
    size = -(-size // multiple) * multiple
    buckets = []
    for m in np.unique(size).tolist():
        index = np.flatnonzero(size == m)

        def read(row: int, index: np.ndarray = index) -> tuple[np.ndarray, np.ndarray | None]:
            i = int(index[row])
            own, at = np.asarray(features[i]), cells[i]
            if len(kept[i]) == len(own):
                return own, at
            return own[kept[i]], None if at is None else at[kept[i]]

        buckets.append(Bucket(index, m, lengths[index], features[0].shape[1], read))
    return buckets


def _sample(count: int, most: int | None, seed: list[int]) -> np.ndarray:
    if most is None or count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def padded_sizes(
    lengths: np.ndarray, waste: float = WASTE, most: int = SIZES, saved: int = SAVED
) -> np.ndarray:
    """(n,) size each bag is padded to: the fewest sizes, `most` at most, that keep the waste (padded instances over
    real ones) below `waste`, each placed where it saves most. Where another would save fewer instances than `saved`,
    the waste may be ENOUGH."""
    # Rounded up by less than a thirty-second: bags of nearly one size share it.
    step = 2 ** np.maximum(np.log2(np.maximum(lengths, 1)).astype(int) - 5, 0)
    own = np.maximum(-(-lengths // step) * step, 1)
    sizes = [int(own.max())]
    while True:
        padded = _padded(own, sizes)
        if padded.sum() <= waste * max(lengths.sum(), 1) or len(sizes) == most:
            return padded
        others = np.setdiff1d(own, sizes)
        if not len(others):
            return padded
        best = int(min(others, key=lambda s: _padded(own, [*sizes, s]).sum()))
        gain = padded.sum() - _padded(own, [*sizes, best]).sum()
        if gain < saved and padded.sum() <= max(waste, ENOUGH) * lengths.sum():
            return padded
        sizes.append(best)


def _padded(own: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The least of `sizes` that is no smaller than each of `own`."""
    ladder = np.sort(sizes)
    return ladder[np.searchsorted(ladder, own)]


def waste(buckets: Sequence[Bucket]) -> float:
    """Padded instances over real ones."""
    real = sum(int(b.lengths.sum()) for b in buckets)
    return sum(b.size * len(b.index) for b in buckets) / max(real, 1)
