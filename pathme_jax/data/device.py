"""Batches of numpy arrays to batches on the devices, loaded while the step runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

AHEAD = 2  # batches: one moving to the device while the next is decoded


def rows_of(sharding: jax.sharding.Sharding, samples: int) -> list[tuple[int, int]]:
    """The samples of a batch that this process must read, those its devices hold: rising runs [start, stop).

    Usually one run; on a TPU pod the mesh follows the network, and a host's devices need not be neighbours.
    """
    parts = sharding.addressable_devices_indices_map((samples,)).values()
    runs: list[tuple[int, int]] = []
    for start, stop in sorted({part[0].indices(samples)[:2] for part in parts if part}):
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, stop))
    return runs


def to_device(
    batches: Generator[Mapping[str, np.ndarray], None, None],
    sharding: jax.sharding.Sharding,
    samples: int,
) -> Generator[tuple[dict[str, jax.Array], float], None, None]:
    """(batch on the devices, seconds waited for it), two batches ahead of the consumer.

    Args:
        batches: this process's rows of each batch, as `rows_of` says; closed when this ends.
        sharding: of every array of a batch; its first axis is the samples'.
        samples: in a batch, over all processes.

    Raises:
        whatever `batches` raises, when its turn comes.
    """

    def load() -> dict[str, jax.Array] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        return {
            name: jax.make_array_from_process_local_data(
                sharding, value, (samples, *value.shape[1:])
            )
            for name, value in batch.items()
        }

    thread = ThreadPoolExecutor(1, "to_device")
    try:
        loading = deque(thread.submit(load) for _ in range(AHEAD))
        while True:
            started = time.perf_counter()
            batch = loading.popleft().result()
            waited = time.perf_counter() - started
            if batch is None:
                return
            loading.append(thread.submit(load))
            yield batch, waited
    finally:
        thread.shutdown(cancel_futures=True)
        batches.close()
