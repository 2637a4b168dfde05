"""Loading batches onto devices: ahead of the step, in order, with errors and ends where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pathme_jax.data.device import rows_of, to_device
from pathme_jax.errors import UserError


def whole() -> NamedSharding:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


class Batches:
    """Counts what was asked of it; fails at batch `fails`, ends before `count`."""

    def __init__(self, count: int, fails: int | None = None, seconds: float = 0.0):
        self.count, self.fails, self.seconds = count, fails, seconds
        self.made, self.closed = 0, False

    def run(self) -> Generator[dict[str, np.ndarray], None, None]:
        try:
            for i in range(self.count):
                if i == self.fails:
                    raise UserError(f"shard {i} is gone", "Bring it back")
                time.sleep(self.seconds)
                self.made += 1
                yield {"x": np.full((4, 3), i, np.float32), "mpp": np.full(4, i, np.float32)}
        finally:
            self.closed = True


def loaders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("to_device")]


def test_batches_come_in_order_and_as_global_arrays():
    batches = Batches(5)
    found = [(batch, waited) for batch, waited in to_device(batches.run(), whole(), 4)]
    assert [int(batch["x"][0, 0]) for batch, _ in found] == [0, 1, 2, 3, 4]
    assert all(batch["x"].shape == (4, 3) and batch["mpp"].shape == (4,) for batch, _ in found)
    assert all(batch["x"].sharding == whole() and waited >= 0 for batch, waited in found)
    assert batches.closed and not loaders()


def test_the_next_batches_are_loaded_during_the_step():
    batches = Batches(6, seconds=0.05)
    stream = to_device(batches.run(), whole(), 4)
    next(stream)
    until = time.monotonic() + 10
    while batches.made < 3 and time.monotonic() < until:
        time.sleep(0.01)  # the step
    time.sleep(0.2)
    assert batches.made == 3  # the one given and two ahead, no more
    assert next(stream)[1] < 0.05  # its own 0.05 s of the host were spent before
    stream.close()


def test_the_wait_for_a_slow_host_is_reported():
    stream = to_device(Batches(3, seconds=0.2).run(), whole(), 4)
    assert next(stream)[1] > 0.1
    stream.close()


def test_an_error_surfaces_when_its_batch_is_due():
    stream = to_device(Batches(5, fails=2).run(), whole(), 4)
    assert [int(next(stream)[0]["x"][0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match="shard 2 is gone"):
        next(stream)
    assert not loaders()


def test_closing_ends_the_thread_and_the_batches():
    batches = Batches(10**6)
    stream = to_device(batches.run(), whole(), 4)
    next(stream)
    assert loaders()
    stream.close()
    assert batches.closed and not loaders()


def test_one_process_reads_every_row():
    assert rows_of(whole(), 8) == [(0, 8)]


class OfProcess:
    """A sharding as one process of several sees it: what its devices hold."""

    def __init__(self, *rows: slice):
        self.rows = rows

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        return {f"device {i}": (rows,) for i, rows in enumerate(self.rows)}


def test_a_process_reads_the_rows_of_its_devices():
    """Two of them may hold the same rows, where the model is sharded too."""
    assert rows_of(OfProcess(slice(4, 6), slice(6, 8), slice(4, 6)), 8) == [(4, 8)]
    assert rows_of(OfProcess(slice(None)), 8) == [(0, 8)]


def test_scattered_rows_are_several_runs():
    """As on a TPU pod, where the mesh follows the network and not the hosts."""
    held = OfProcess(slice(4, 6), slice(0, 1), slice(1, 2))
    assert rows_of(held, 8) == [(0, 2), (4, 6)]
