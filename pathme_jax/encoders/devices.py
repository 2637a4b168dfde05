"""Several encoders on all local devices of this process, fed so that neither side waits for the other."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pathme_jax.data.device import to_device
from pathme_jax.data.stores import Failure
from pathme_jax.data.tiles import Item
from pathme_jax.encoders.encoder import Encoder
from pathme_jax.errors import UserError
from pathme_jax.training.cost import matmul_flops
from pathme_jax.training.watch import peak_flops

IN_FLIGHT = 2  # batches whose features are fetched later, so that the next is queued already


class Part(NamedTuple):
    """Some of an item's tiles, and where in a batch they are; otherwise as `Item`."""

    task: int
    last: bool
    rows: slice
    multiple: np.ndarray
    grid: np.ndarray
    held: bool
    failed: Failure | None


class Speed:
    """What was encoded, and how long it took."""

    def __init__(self) -> None:
        self.tiles, self.seconds, self.waited, self.flops = 0, 0.0, 0.0, 0.0

    @property
    def rate(self) -> float:
        """Tiles a second, each with all its encoders."""
        return self.tiles / self.seconds if self.seconds else 0.0

    @property
    def data_wait(self) -> float:
        """Share of the time that the devices' queue was empty for want of data."""
        return self.waited / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Share of the devices' peak; None where that is not known."""
        peak = peak_flops(jax.local_devices()[0])
        return self.flops_a_device / peak if peak else None

    @property
    def flops_a_device(self) -> float:
        """FLOP/s of matrix products."""
        return self.flops / self.seconds / jax.local_device_count() if self.seconds else 0.0

    def __str__(self) -> str:
        mfu = "" if self.mfu is None else f", MFU {self.mfu:.0%}"
        return (
            f"{self.tiles} tiles in {self.seconds:.1f} s, {self.rate:.3g} tiles/s,"
            f" {self.flops_a_device / 1e12:.3g} TFLOP/s a device{mfu}, data-wait {self.data_wait:.0%}"
        )


class Devices:
    """Encoders of images, compiled for batches of one shape, spread over the local devices.

    Args:
        batch: tiles; rounded up to a multiple of the devices.
        px: side of a tile.

    Attributes:
        widths: encoder name to features a tile.

    Raises:
        UserError: an encoder cannot take such tiles, or such batches do not fit the device.
    """

    def __init__(self, encoders: Sequence[Encoder], batch: int, px: int):
        devices = jax.local_devices()
        mesh = jax.make_mesh(
            (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
        )
        self.batch, self.px = batch + -batch % len(devices), px
        self._sharding = NamedSharding(mesh, PartitionSpec("data"))
        copies = NamedSharding(mesh, PartitionSpec())
        shape = (self.batch, px, px, 3)
        images = {"image": jax.ShapeDtypeStruct(shape, np.uint8, sharding=self._sharding)}
        self.widths: dict[str, int] = {}
        self._apply: dict[str, Callable] = {}
        self._flops: dict[str, float] = {}
        with self._fitting():
            for encoder in encoders:
                params = jax.device_put(encoder.params, copies)
                compiled = jax.jit(encoder.apply).lower(params, images).compile()
                self.widths[encoder.name] = int(compiled.out_info.shape[-1])
                self._apply[encoder.name] = functools.partial(compiled, params)
                self._flops[encoder.name] = matmul_flops(encoder.apply, params, images)

    def encode(
        self,
        items: Generator[Item, None, None],
        wanted: Callable[[int], Collection[str]],
        speed: Speed,
    ) -> Iterator[tuple[list[Part], Mapping[str, np.ndarray]]]:
        """(parts of a batch, encoder name to its features (batch, width)), in order.

        Args:
            items: closed at the end.
            wanted: the encoders that a task wants; others are not run on a batch without such a task.
            speed: is kept up to date.
        """
        parts: collections.deque[list[Part]] = collections.deque()
        flying: collections.deque[tuple[list[Part], dict[str, jax.Array]]] = collections.deque()

        def images() -> Generator[Mapping[str, np.ndarray], None, None]:
            with contextlib.closing(items):
                for batch, its_parts in pack(items, self.batch, self.px):
                    parts.append(its_parts)
                    yield {"image": batch}

        started, before = time.perf_counter(), speed.seconds
        with contextlib.closing(to_device(images(), self._sharding, self.batch)) as batches:
            for batch, waited in batches:
                its_parts = parts.popleft()
                tasks = {part.task for part in its_parts if len(part.multiple)}
                names = {name for task in tasks for name in wanted(task)}
                with self._fitting():
                    flying.append((its_parts, {name: self._apply[name](batch) for name in names}))
                speed.waited += waited
                speed.tiles += sum(len(part.multiple) for part in its_parts)
                speed.flops += sum(self._flops[name] for name in names)
                if len(flying) > IN_FLIGHT:
                    yield self._fetch(*flying.popleft())
                speed.seconds = before + time.perf_counter() - started
            while flying:
                yield self._fetch(*flying.popleft())
                speed.seconds = before + time.perf_counter() - started

    def _fetch(
        self, parts: list[Part], features: Mapping[str, jax.Array]
    ) -> tuple[list[Part], Mapping[str, np.ndarray]]:
        with self._fitting():
            return parts, {name: np.asarray(x, np.float32) for name, x in features.items()}

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"the devices have no memory for batches of {self.batch} tiles",
                f"Try --batch {max(1, self.batch // 2)}, or fewer encoders at once",
            ) from error


def pack(items: Iterator[Item], batch: int, px: int) -> Iterator[tuple[np.ndarray, list[Part]]]:
    """(batch, px, px, 3) images across items, and their parts. The last one ends in black tiles."""
    images, parts, filled = np.empty((batch, px, px, 3), np.uint8), [], 0
    for item in items:
        start = 0
        while True:
            stop = min(len(item.images), start + batch - filled)
            rows = slice(filled, filled + stop - start)
            images[rows] = item.images[start:stop]
            complete = stop == len(item.images)
            # Copies: an item of a worker lies in shared memory, which is to be given back at once.
            multiple, grid = np.array(item.multiple[start:stop]), np.array(item.grid[start:stop])
            last = item.last and complete
            parts.append(Part(item.task, last, rows, multiple, grid, item.held, item.failed))
            start, filled = stop, rows.stop
            if filled == batch:
                yield images, parts
                # A new one: the device may still read this, and the CPU's shares its memory.
                images, parts, filled = np.empty((batch, px, px, 3), np.uint8), [], 0
            if complete:
                break
    if parts:
        images[filled:] = 0
        yield images, parts
