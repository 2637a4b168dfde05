"""Grain pipelines: records to batches of numpy arrays.

The position in the data is one number, the samples seen: batch i is the same whatever the number of
workers, processes or devices, and a pipeline can start at any batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import grain
import jax
import numpy as np
from absl import flags

from pathme_jax.errors import UserError
from pathme_jax.records import fields
from pathme_jax.records.regions import RegionSource
from pathme_jax.training.contract import BatchSpec
from pathme_jax.workers import started


def open_source(folder: str | Path, spec: BatchSpec) -> fields.Source | RegionSource:
    """The records a method asks for.

    Raises:
        UserError: none there, or of the wrong kind; a shard is missing or truncated.
    """
    if spec.record == "regions":
        source = RegionSource(folder, spec.columns)
    elif spec.record == "fields":
        source = fields.FieldSource(folder)
    else:
        raise UserError(f"batch_spec.record is {spec.record!r}", 'Expected "fields" or "regions"')
    if not len(source):
        raise UserError(f"{folder}: holds no {spec.record}", "Check the stage that made it")
    return source


def shapes(source: Any, spec: BatchSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """Of the arrays of one global batch."""
    if spec.record == "fields":
        side, n = spec.window_px, spec.samples
        shape = {"window": ((n, side, side, 3), np.uint8), "mpp": ((n,), np.float32)}
        return {name: jax.ShapeDtypeStruct(*x) for name, x in shape.items()}
    return {
        name: jax.ShapeDtypeStruct((spec.samples, *np.shape(x)), np.asarray(x).dtype)
        for name, x in source[0].items()
    }


def batches(
    folder: str | Path,
    spec: BatchSpec,
    *,
    seed: int,
    first_batch: int = 0,
    rows: Sequence[tuple[int, int]] | None = None,
    workers: int = 0,
    threads: int | None = None,
) -> Generator[Mapping[str, np.ndarray], None, None]:
    """Endless shuffled batches, starting at batch `first_batch` of the run.

    Fields give {"window": (samples, px, px, 3) uint8, "mpp": (samples,) float32}; regions give the
    method's columns, (samples, s, s, d) float32 and `_valid` bool. Close it to end its workers.

    Args:
        rows: runs [start, stop) of the samples of every batch that this process reads, rising (default:
            all). The processes' rows, put together, are the batch that one process would read.
        workers: processes that decode, beside this one. 0: threads of this process do.
        threads: how many threads that is (default: one a core); each makes a whole batch. A worker
            has one.

    Raises:
        UserError: the batch, or `rows`, is no multiple of the windows cut from a field; a record cannot
            be read. From a thread or a worker it reaches the caller as it was raised.
    """
    source: Any = open_source(folder, spec)
    rows = tuple(rows or [(0, spec.samples)])
    records = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if spec.record == "fields":
        ends = [("a process's rows, cut at", end) for run in rows for end in run]
        for what, count in [("samples a batch", spec.samples), *ends]:
            if count % spec.windows_per_field:
                raise UserError(
                    f"{what} {count}: no multiple of {spec.windows_per_field} windows a field",
                    "Change config.batch.samples or config.batch.windows_per_field",
                )
        made: Any = WindowBatches(records, spec, seed, rows)
    else:
        made = RegionBatches(records, spec.samples, rows)
    threads = 1 if workers else threads or os.cpu_count() or 1
    cv2.setNumThreads(0)  # ours are enough; OpenCV's own only wait for each other
    stream = grain.MapDataset.source(made)[first_batch:].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, even outside absl.app
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers),
            worker_init_fn=functools.partial(started, os.getpid()),
        )
    with contextlib.closing(iter(stream)) as made_batches:
        yield from made_batches


@dataclasses.dataclass(frozen=True)
class RegionBatches:
    """Batch i: records `rows` (runs) of each `samples`, stacked. A source for Grain."""

    records: Any
    samples: int
    rows: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.records) // self.samples

    def __getitem__(self, batch: int) -> dict[str, np.ndarray]:
        first = batch * self.samples
        items = [self.records[first + i] for run in self.rows for i in range(*run)]
        return {name: np.stack([item[name] for item in items]) for name in items[0]}


@dataclasses.dataclass(frozen=True)
class WindowBatches:
    """Batch i: samples `rows` (runs) of it, cut from stored fields. A source for Grain.

    A field's windows are drawn from the seed and its position in the run, so they do not change with
    who reads it. They are written where they belong in the batch: stacking them afterwards, into
    memory fresh from the system, took a fifth as long as decoding.
    """

    records: Any
    spec: BatchSpec
    seed: int
    rows: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.records) // (self.spec.samples // self.spec.windows_per_field)

    def __getitem__(self, batch: int) -> dict[str, np.ndarray]:
        px, count = self.spec.window_px, self.spec.windows_per_field
        samples = [first for run in self.rows for first in range(*run, count)]  # of each field
        windows = np.empty((len(samples) * count, px, px, 3), np.uint8)
        mpps = np.empty(len(windows), np.float32)
        for i, sample in enumerate(samples):
            position = (batch * self.spec.samples + sample) // count
            rng = np.random.default_rng((self.seed, position))
            own = slice(i * count, (i + 1) * count)
            mpps[own] = cut_windows(self.records[position], self.spec.mpps, windows[own], rng)
        return {"window": windows, "mpp": mpps}


def cut_windows(
    field: Mapping[str, Any], mpps: Sequence[float], out: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Fills `out` with square windows of one stored field, each at a µm/px drawn from `mpps`.

    A window's centre lies in a tissue tile where the field's edge lets it; coarser windows are area
    averages. No two windows cover the whole field: all but one of those are drawn at the finest µm/px.

    Args:
        field: a record of `fields.FieldSource`. out: (n, px, px, 3) uint8.

    Returns:
        (n,) µm/px.

    Raises:
        UserError: a window would be larger than the field.
    """
    count, px = out.shape[:2]
    image, stored = fields.decode(field["image"]), float(field["mpp"])
    side = image.shape[0]
    tissue = np.argwhere(field["tissue"])
    tile = side / len(field["tissue"])
    drawn = rng.choice(mpps, count)
    extents = np.round(px * drawn / stored).astype(int)
    if extents.max() > side:
        raise UserError(
            f"a window of {px} px at {drawn.max():g} µm/px is larger than a field"
            f" ({side} px at {stored:g})",
            "Lower config.batch.window_px or config.batch.mpps",
        )
    centres = (tissue[rng.integers(len(tissue), size=count)] + rng.random((count, 2))) * tile
    corners = np.round(centres - extents[:, None] / 2).clip(0, side - extents[:, None]).astype(int)
    whole = np.flatnonzero(extents == side)
    # The field has one such place, and duplicates teach nothing: draw finer ones.
    for i in whole[1:]:
        finest = int(np.argmin(mpps))
        drawn[i], extents[i] = mpps[finest], round(px * mpps[finest] / stored)
        corners[i] = np.round(centres[i] - extents[i] / 2).clip(0, side - extents[i]).astype(int)
    for window, (top, left), extent in zip(out, corners.tolist(), extents.tolist(), strict=True):
        _averaged(image[top : top + extent, left : left + extent], window)
    return drawn


def _averaged(image: np.ndarray, out: np.ndarray) -> None:
    """Area average into `out`; halved twice for a factor 4, within a grey level of at once and in a
    third of the time (the largest after decoding)."""
    side, px = len(image), len(out)
    if side == px:
        out[...] = image
        return
    if side == 4 * px:
        image = cv2.resize(image, (2 * px, 2 * px), interpolation=cv2.INTER_AREA)
    cv2.resize(image, (px, px), out, interpolation=cv2.INTER_AREA)
