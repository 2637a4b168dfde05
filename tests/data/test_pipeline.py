"""The data pipeline: batch i is the same whoever reads it, from wherever the reading started."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from pathme_jax.data.pipeline import RegionBatches, batches, cut_windows, open_source
from pathme_jax.errors import UserError
from pathme_jax.records import fields
from pathme_jax.training.contract import BatchSpec

SPEC = BatchSpec("fields", samples=8, window_px=64, mpps=(0.5, 2.0), windows_per_field=2)


def take(grid_dir: Path, count: int, **how) -> list:
    with contextlib.closing(batches(grid_dir, SPEC, seed=5, **how)) as stream:
        return list(itertools.islice(stream, count))


def same(one: list, other: list) -> bool:
    return all(
        np.array_equal(a[k], b[k])
        for a, b in zip(one, other, strict=True)
        for k in ("window", "mpp")
    )


def test_a_run_can_start_at_any_batch(grid_dir: Path):
    """Past the end of the first epoch too: four slides hold fewer fields than fifty batches take."""
    whole = take(grid_dir, 30)
    assert len(open_source(grid_dir, SPEC)) < 100
    assert same(whole[26:], take(grid_dir, 4, first_batch=26))
    assert not same(whole[:4], whole[26:])


def test_workers_and_threads_change_nothing(grid_dir: Path):
    alone = take(grid_dir, 6, first_batch=3, threads=1)
    assert same(alone, take(grid_dir, 6, first_batch=3, workers=2))
    assert same(alone, take(grid_dir, 6, first_batch=3, threads=4))


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_rows_together_are_the_batch(grid_dir: Path, processes: int):
    whole = take(grid_dir, 3, first_batch=1)
    each = SPEC.samples // processes
    shares = [
        take(grid_dir, 3, first_batch=1, rows=[(i * each, (i + 1) * each)])
        for i in range(processes)
    ]
    assert shares[0][0]["window"].shape == (each, 64, 64, 3)
    together = [
        {k: np.concatenate([part[k] for part in parts]) for k in ("window", "mpp")}
        for parts in zip(*shares, strict=True)
    ]
    assert same(whole, together)


def test_a_process_reads_its_own_records_only():
    """Regions: batch 5 of 4, the second half of it; then runs that are no neighbours."""
    records = [{"x": np.array([i])} for i in range(100)]
    assert RegionBatches(records, 4, ((2, 4),))[5]["x"].tolist() == [[22], [23]]
    assert RegionBatches(records, 4, ((0, 1), (3, 4)))[5]["x"].tolist() == [[20], [23]]


def test_runs_of_rows_that_are_no_neighbours_are_those_of_the_batch(grid_dir: Path):
    """As the hosts of a TPU pod read them."""
    whole = take(grid_dir, 2)
    part = take(grid_dir, 2, rows=[(0, 2), (6, 8)])
    for one, all_ in zip(part, whole, strict=True):
        np.testing.assert_array_equal(one["window"], all_["window"][[0, 1, 6, 7]])


@pytest.mark.parametrize("how", [{"rows": [(0, 3)]}, {"rows": [(1, 8)]}])
def test_rows_that_split_a_field_between_processes_are_refused(grid_dir: Path, how: dict):
    with pytest.raises(UserError, match="windows a field"):
        take(grid_dir, 1, **how)


def test_a_batch_that_splits_a_field_is_refused(grid_dir: Path):
    spec = dataclasses.replace(SPEC, samples=5)
    with pytest.raises(UserError, match=r"5.* 2 windows a field"):
        next(batches(grid_dir, spec, seed=0))


def test_windows_have_the_size_and_mpp_asked_for(grid_dir: Path):
    batch = take(grid_dir, 1)[0]
    assert batch["window"].shape == (8, 64, 64, 3) and batch["window"].dtype == np.uint8
    assert set(batch["mpp"]) == {0.5, 2.0} and batch["mpp"].dtype == np.float32


def copied(grid_dir: Path, to: Path) -> tuple[Path, Path]:
    """A tiled folder of one's own, and its first shard."""
    shutil.copytree(grid_dir, to)
    return to, sorted((to / "fields").glob("*.array_record"))[0]


def spoil(shard: Path) -> None:
    """Changes bytes in the middle of every record, and neither size nor headers of blocks."""
    data = bytearray(shard.read_bytes())
    for at in range(5000, len(data), 20000):
        data[at] ^= 255
    shard.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, lambda shard: shard.write_bytes(b"")])
def test_a_missing_or_truncated_shard_is_named_before_the_first_batch(
    grid_dir: Path, tmp_path: Path, damage
):
    folder, shard = copied(grid_dir, tmp_path / "grid")
    damage(shard)
    with pytest.raises(UserError, match=rf"{shard.name}: 0 bytes.*data_prep\.tile"):
        next(batches(folder, SPEC, seed=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_record_is_named_from_threads_and_workers(
    grid_dir: Path, tmp_path: Path, workers: int
):
    folder, shard = copied(grid_dir, tmp_path / "grid")
    spoil(shard)
    with pytest.raises(
        UserError, match=rf"{shard.name}: record \d+ cannot be read.*data_prep\.tile"
    ):
        take(folder, 40, workers=workers)


def test_a_coarse_window_is_the_area_average_of_its_pixels():
    """A field that is tissue in one corner tile: the windows' centres lie there where the edge lets them."""
    image = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3)).astype(np.uint8)
    image = cv2.blur(image, (9, 9))
    tissue = np.zeros((4, 4), bool)
    tissue[0, 0] = True
    field = {"image": fields.encode(image), "tissue": tissue, "mpp": 0.5}
    stored = fields.decode(field["image"])
    whole = np.empty((2, 256, 256, 3), np.uint8)
    assert cut_windows(field, (2.0,), whole, np.random.default_rng(0)).tolist() == [2.0, 2.0]
    for window in whole:  # halved twice: within a grey level of averaging at once
        gap = window.astype(int) - fields.area_average(stored)
        assert np.abs(gap).max() <= 1 and abs(gap.mean()) < 0.3
    fine = np.empty((8, 64, 64, 3), np.uint8)
    cut_windows(field, (0.5,), fine, np.random.default_rng(0))
    for window in fine:
        found = cv2.matchTemplate(stored[:288, :288], window, cv2.TM_SQDIFF).min()
        assert found < 1000  # of 8e8 for unrelated pixels: float error of the correlation
    assert not np.array_equal(fine[0], fine[1])


def test_a_field_is_shown_whole_once_at_most():
    """Duplicates in a batch would teach nothing, and send KoLeo to infinity."""
    image = np.random.default_rng(0).integers(0, 255, (256, 256, 3)).astype(np.uint8)
    field = {"image": fields.encode(image), "tissue": np.ones((4, 4), bool), "mpp": 0.5}
    seen = set()
    for seed in range(20):
        out = np.empty((6, 64, 64, 3), np.uint8)
        mpps = cut_windows(field, (0.5, 2.0), out, np.random.default_rng(seed))
        assert (mpps == 2.0).sum() <= 1
        assert len({window.tobytes() for window in out}) == 6
        seen |= set(mpps.tolist())
    assert seen == {0.5, 2.0}


def test_a_window_larger_than_a_field_is_refused():
    field = {
        "image": fields.encode(np.zeros((64, 64, 3), np.uint8)),
        "tissue": np.ones((4, 4)),
        "mpp": 0.5,
    }
    with pytest.raises(UserError, match="larger than a field"):
        cut_windows(field, (2.0,), np.empty((1, 64, 64, 3), np.uint8), np.random.default_rng(0))


def test_an_unknown_record_is_refused(grid_dir: Path):
    with pytest.raises(UserError, match="videos"):
        open_source(grid_dir, BatchSpec("videos", samples=1))


THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathme_jax.records.fields import FieldSource
source = FieldSource(sys.argv[1])
before = set(sys.modules)
with ThreadPoolExecutor(4) as threads:
    list(threads.map(source.__getitem__, range(8)))
late = sorted(set(sys.modules) - before)
assert not late, late
"""


def test_threads_that_read_import_nothing(grid_dir: Path):
    """Two threads that import TFDS at once can wait for each other for ever: seen in a training run."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", THREADS, str(grid_dir)], env=env, check=True)
