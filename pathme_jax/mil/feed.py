"""The order in which bags are seen, and how they come to the devices: kept there, or streamed from where they lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pathme_jax.mil.buckets import Bucket
from pathme_jax.mil.heads.common import Bag

RUN = 16  # steps in one program; the order of bags is shuffled in runs of bags of one size
RUN_BYTES = 512 << 20  # of features in one run, where a step alone is not more
SHARE = 0.4  # of a device's memory that may hold bags
UNKNOWN = 4 << 30  # taken for a device's memory where it does not say


@dataclasses.dataclass(frozen=True)
class Run:
    """Steps on bags of one size.

    Attributes:
        which: bucket. rows: (k, b) of it, -1 where filled up.
        bags: on the devices: the whole bucket, or these steps' own.
        places: (k, b) rows of `bags`, the first one where filled up.
    """

    which: int
    rows: np.ndarray
    bags: Bag
    places: np.ndarray


class Feed:
    """Buckets that are on the devices if they fit, and come from disk run by run, two ahead, if they do not.

    Both ways the order is the same, and so is every number computed.
    """

    def __init__(
        self, buckets: Sequence[Bucket], put: Callable[[Bag], Bag], resident: int | None = None
    ):
        """put: bags to the devices. resident: bytes that may stay there; None: a share of their memory."""
        self.buckets, self.put = buckets, put
        whole = sum(bucket.bag_bytes * len(bucket.index) for bucket in buckets)
        self.streamed = whole > (memory() if resident is None else resident)
        self.kept = [] if self.streamed else [put(bucket.arrays()) for bucket in buckets]

    def epoch(self, batch: int, seed: Sequence[int]) -> Iterator[Run]:
        """One epoch of batches, in an order that the seed decides."""
        return self._runs(order(self.buckets, batch, seed))

    def once(self) -> Iterator[Run]:
        """Every bag once, one a step, in the order of the buckets."""
        for which, bucket in enumerate(self.buckets):
            steps = _steps(bucket, 1) if self.streamed else len(bucket.index)
            rows = np.arange(len(bucket.index))
            yield from self._runs(
                [(which, part[:, None]) for part in np.split(rows, range(steps, len(rows), steps))]
            )

    def _runs(self, runs: list[tuple[int, np.ndarray]]) -> Iterator[Run]:
        if not self.streamed:
            for which, rows in runs:
                yield Run(which, rows, self.kept[which], np.maximum(rows, 0))
            return
        import grain  # slow to import, and needed here only

        def read(run: Any) -> Any:
            which, rows = run
            return which, rows, self.buckets[which].arrays(np.maximum(rows, 0).ravel())

        # Threads: HDF5 and NumPy release the interpreter while they copy.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
        for which, rows, bags in grain.MapDataset.source(runs).map(read).to_iter_dataset(options):
            yield Run(which, rows, self.put(bags), np.arange(rows.size).reshape(rows.shape))


def order(
    buckets: Sequence[Bucket], batch: int, seed: Sequence[int]
) -> list[tuple[int, np.ndarray]]:
    """One epoch: runs of (bucket, rows (k, b)), shuffled within a bucket and between; -1 fills up."""
    rng = np.random.default_rng(seed)
    runs = []
    for which, bucket in enumerate(buckets):
        steps = -(-len(bucket.index) // batch)
        count = -(-steps // _steps(bucket, batch))
        rows = np.full(count * -(-steps // count) * batch, -1)
        rows[: len(bucket.index)] = rng.permutation(len(bucket.index))
        runs += [(which, part) for part in rows.reshape(count, -1, batch)]
    return [runs[i] for i in rng.permutation(len(runs))]


def _steps(bucket: Bucket, batch: int) -> int:
    """Steps in a run of this bucket."""
    return max(1, min(RUN, RUN_BYTES // (batch * bucket.bag_bytes)))


def memory() -> int:
    """Bytes of bags that the devices of this process may hold: each holds them all."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(SHARE * stats.get("bytes_limit", UNKNOWN / SHARE))
