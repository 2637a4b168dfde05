"""Grain pipelines: records to batches of numpy arrays.

The position in the data is one number, the samples seen: batch i is the same whatever the number of
workers or hosts, and a pipeline can start at any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags

from pathme_jax.errors import UserError
from pathme_jax.records import fields
from pathme_jax.records.regions import RegionSource
from pathme_jax.training.contract import BatchSpec


def open_source(folder: str | Path, spec: BatchSpec) -> fields.Source | RegionSource:
    """The records a method asks for.

    Raises:
        UserError: none there, or of the wrong kind.
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


def batches(
    folder: str | Path, spec: BatchSpec, *, seed: int, first_batch: int = 0, workers: int = 0
) -> Iterator[Mapping[str, np.ndarray]]:
    """Endless shuffled batches, starting at batch `first_batch` of the run.

    Fields give {"window": (samples, px, px, 3) uint8, "mpp": (samples,) float32}; regions give the
    method's columns, (samples, s, s, d) float32 and `_valid` bool.
    """
    source: Any = open_source(folder, spec)
    records = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    per_batch = spec.samples
    if spec.record == "fields":
        per_batch, rest = divmod(spec.samples, spec.windows_per_field)
        if rest:
            raise UserError(
                f"{spec.samples} samples a batch is no multiple of {spec.windows_per_field} windows a field",
                "Change config.batch.samples or config.batch.windows_per_field",
            )
        records = records.random_map(CutWindows(spec.window_px, spec.mpps, spec.windows_per_field))
    records = records[first_batch * per_batch :].batch(per_batch)
    stream = records.to_iter_dataset(
        grain.ReadOptions(num_threads=2 if workers == 0 else 1, prefetch_buffer_size=4)
    )
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, even outside absl.app
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    for batch in stream:
        if spec.record == "fields":
            batch = {k: v.reshape(spec.samples, *v.shape[2:]) for k, v in batch.items()}
        yield batch


class CutWindows(grain.transforms.RandomMap):
    """One stored field to several square windows, each at a µm/px drawn from `mpps`.

    A window's centre lies in a tissue tile where the field's edge lets it; coarser windows are exact
    area averages.
    """

    def __init__(self, px: int, mpps: tuple[float, ...], count: int):
        self.px, self.mpps, self.count = px, mpps, count

    def random_map(self, element: Mapping, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = fields.decode(element["image"])
        side = image.shape[0]
        tissue = np.argwhere(np.asarray(element["tissue"], bool))
        tile = side / np.asarray(element["tissue"]).shape[0]
        windows = np.empty((self.count, self.px, self.px, 3), np.uint8)
        mpps = np.empty(self.count, np.float32)
        for i in range(self.count):
            mpps[i] = mpp = rng.choice(self.mpps)
            extent = round(self.px * mpp / float(element["mpp"]))
            if extent > side:
                raise UserError(
                    f"a window of {self.px} px at {mpp} µm/px is larger than a field"
                    f" ({side} px at {float(element['mpp']):g})",
                    "Lower config.batch.window_px or config.batch.mpps",
                )
            centre = (tissue[rng.integers(len(tissue))] + rng.random(2)) * tile
            top, left = np.clip(np.round(centre - extent / 2), 0, side - extent).astype(int)
            window = image[top : top + extent, left : left + extent]
            if extent != self.px:
                window = cv2.resize(window, (self.px, self.px), interpolation=cv2.INTER_AREA)
            windows[i] = window
        return {"window": windows, "mpp": mpps}
