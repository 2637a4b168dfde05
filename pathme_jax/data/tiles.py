"""Tiles of many slides as one stream, read through Grain.

An item is one field, read once: its tissue tiles and its coarser view; or one region's view. Items come
slide by slide, in the order of the plan. A slide is claimed before its first pixel is read; items of
slides that are another process's carry no pixels.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import gc
import itertools
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import grain
import numpy as np
from absl import flags

from pathme_jax.data.stores import Failure, Slide, Store, failure
from pathme_jax.records import features, fields
from pathme_jax.records.claims import Claims
from pathme_jax.workers import started

THREADS = 4  # that read, where no other process does
AHEAD = 2  # items a worker has ready


@dataclasses.dataclass(frozen=True)
class Task:
    """One slide to encode.

    Attributes:
        multiples: of the finest µm/px, those still wanted.
        files: to be written, each with its recipe.
    """

    slide: Slide
    multiples: Sequence[int]
    files: Mapping[Path, str]

    @property
    def fields(self) -> int:
        """Items that are fields."""
        return self.slide.fields if {1, 4} & set(self.multiples) else 0

    @property
    def items(self) -> int:
        """At least one, so that a slide without tiles is met too."""
        return max(1, self.fields + (self.slide.regions if 16 in self.multiples else 0))

    @property
    def tiles(self) -> int:
        return sum(map(self.slide.count, self.multiples))

    def missing(self) -> list[Path]:
        """Files that are not there under their recipe."""
        return [path for path, made in self.files.items() if features.recipe_of(path) != made]


class Item(NamedTuple):
    """Tiles read at once, n of them.

    Attributes:
        task: index of the slide's task. last: of this slide.
        images: (n, px, px, 3) uint8. multiple: (n,). grid: (n, 2) row, column at that multiple.
        held: by another process, or done by it: no images.
        failed: why the slide cannot be read: no images.
    """

    task: int
    last: bool
    images: np.ndarray
    multiple: np.ndarray
    grid: np.ndarray
    held: bool = False
    failed: Failure | None = None


class Lost(Exception):
    """A worker died while it read these slides."""

    def __init__(self, slide_ids: Sequence[str]):
        super().__init__(slide_ids)
        self.slide_ids = slide_ids


class Tiles:
    """All items of the tasks, in order: a source for Grain."""

    def __init__(self, store: Store, tasks: Sequence[Task], claims: Claims):
        self.store, self.tasks, self.claims = store, tasks, claims
        self._starts = [0, *itertools.accumulate(task.items for task in tasks)]
        self._process = os.getpid()
        self._ours: dict[int, bool] = {}
        self._failed: dict[int, Failure] = {}
        self._reading = -1

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Item:
        at = bisect.bisect_right(self._starts, index) - 1
        task, i = self.tasks[at], index - self._starts[at]
        nothing = self._item(at, i, [])
        if at not in self._ours:
            # Who is no longer working on it has finished it, or has left it to be done.
            self._ours[at] = self.claims.take(task.slide.slide_id) and bool(task.missing())
        if not self._ours[at]:
            return nothing._replace(held=True)
        if at not in self._failed:
            self._leave_trace(at)
            try:
                return self._item(at, i, self._read(task, i))
            except Exception as error:
                self._failed[at] = failure(task.slide.slide_id, error)
        return nothing._replace(failed=self._failed[at])

    def _leave_trace(self, at: int) -> None:
        if at != self._reading and os.getpid() != self._process:
            self.claims.reading(self.tasks[at].slide.slide_id)
            self._reading = at

    def _read(self, task: Task, i: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(multiple, images, grid) of item i."""
        slide_id = task.slide.slide_id
        if i >= task.fields:
            if 16 not in task.multiples or not task.slide.regions:
                return []
            image, at = self.store.view(slide_id, i - task.fields)
            return [(16, image[None], np.array([at]))]
        image, at, tissue = self.store.field(slide_id, i)
        parts = []
        if 1 in task.multiples:
            cells = np.argwhere(tissue) + np.multiply(at, len(tissue))
            parts.append((1, _children(image, tissue), cells))
        if 4 in task.multiples:
            parts.append((4, fields.area_average(image)[None], np.array([at])))
        return parts

    def _item(self, at: int, i: int, parts: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> Item:
        px = self.store.tile_px
        images = [images for _, images, _ in parts] or [np.empty((0, px, px, 3), np.uint8)]
        if images[0].shape[1:] != (px, px, 3):
            raise ValueError(f"tiles of {images[0].shape[1:]}, expected {px} px")
        return Item(
            at,
            i == self.tasks[at].items - 1,
            images[0] if len(images) == 1 else np.concatenate(images),
            np.concatenate([np.full(len(x), m) for m, x, _ in parts] or [np.empty(0)]).astype(int),
            np.concatenate([np.empty((0, 2), int), *(grid for _, _, grid in parts)]).astype(int),
        )


def _children(image: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """The tiles of a field that `tissue` says, row by row: (n, px, px, 3)."""
    side = len(tissue)
    px = len(image) // side
    return image.reshape(side, px, side, px, 3).swapaxes(1, 2)[tissue]


def stream(tiles: Tiles, workers: int) -> Generator[Item, None, None]:
    """The items in order, read ahead by `workers` processes, or by threads of this one if 0.

    Close it to end its workers.

    Raises:
        Lost: a worker died.
    """
    cv2.setNumThreads(0)  # ours are enough
    threads = 1 if workers else min(THREADS, os.cpu_count() or 1)
    items = grain.MapDataset.source(tiles).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(AHEAD, threads))
    )
    if workers:
        tiles.claims.forget_workers()
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, even outside absl.app
            flags.FLAGS.mark_as_parsed()
        items = items.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD),
            worker_init_fn=functools.partial(started, os.getpid()),
        )
    try:
        yield from _each(iter(items), tiles.claims)
    finally:
        # Grain's iterators refer to themselves, and the last items' shared memory would outlive them.
        gc.collect()


def _each(items: grain.DatasetIterator[Item], claims: Claims) -> Generator[Item, None, None]:
    with contextlib.closing(items):
        while True:
            try:
                item = next(items, None)
            except RuntimeError as error:
                lost = claims.lost()
                if not lost:
                    raise
                raise Lost(lost) from error
            if item is None:
                return
            yield item
