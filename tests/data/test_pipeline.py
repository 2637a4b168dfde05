"""The data pipeline: any batch can be the first, and workers change nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from pathme_jax.data.pipeline import CutWindows, batches, open_source
from pathme_jax.errors import UserError
from pathme_jax.records import fields
from pathme_jax.training.contract import BatchSpec

SPEC = BatchSpec("fields", samples=4, window_px=64, mpps=(0.5, 2.0), windows_per_field=2)


def take(grid_dir: Path, count: int, **where) -> list:
    return list(itertools.islice(batches(grid_dir, SPEC, seed=5, **where), count))


def same(one: list, other: list) -> bool:
    return all(
        np.array_equal(a[k], b[k])
        for a, b in zip(one, other, strict=True)
        for k in ("window", "mpp")
    )


def test_a_run_can_start_at_any_batch(grid_dir: Path):
    """Past the end of the first epoch too: four slides hold fewer fields than fifty batches take."""
    whole = take(grid_dir, 50)
    assert len(open_source(grid_dir, SPEC)) < 100
    assert same(whole[41:], take(grid_dir, 9, first_batch=41))
    assert not same(whole[:9], whole[41:])


def test_two_workers_give_what_none_give(grid_dir: Path):
    assert same(take(grid_dir, 6, first_batch=3), take(grid_dir, 6, first_batch=3, workers=2))


def test_windows_have_the_size_and_mpp_asked_for(grid_dir: Path):
    batch = take(grid_dir, 1)[0]
    assert batch["window"].shape == (4, 64, 64, 3) and batch["window"].dtype == np.uint8
    assert set(batch["mpp"]) <= {0.5, 2.0}


def test_a_coarse_window_is_the_area_average_of_its_pixels():
    """A field that is tissue in one corner tile: the windows' centres lie there where the edge lets them."""
    image = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3)).astype(np.uint8)
    image = cv2.blur(image, (9, 9))
    tissue = np.zeros((4, 4), bool)
    tissue[0, 0] = True
    element = {"image": fields.encode(image), "tissue": tissue, "mpp": 0.5}
    cut = CutWindows(256, (2.0,), 1).random_map(element, np.random.default_rng(0))
    np.testing.assert_array_equal(
        cut["window"][0], fields.area_average(fields.decode(element["image"]))
    )
    fine = CutWindows(64, (0.5,), 8).random_map(element, np.random.default_rng(0))["window"]
    stored = fields.decode(element["image"])[:288, :288]
    for window in fine:
        found = cv2.matchTemplate(stored, window, cv2.TM_SQDIFF).min()
        assert found < 1000  # of 8e8 for unrelated pixels: float error of the correlation


def test_a_window_larger_than_a_field_is_refused():
    element = {
        "image": fields.encode(np.zeros((64, 64, 3), np.uint8)),
        "tissue": np.ones((4, 4)),
        "mpp": 0.5,
    }
    with pytest.raises(UserError, match="larger than a field"):
        CutWindows(64, (2.0,), 1).random_map(element, np.random.default_rng(0))


def test_an_unknown_record_is_refused(grid_dir: Path):
    with pytest.raises(UserError, match="videos"):
        open_source(grid_dir, BatchSpec("videos", samples=1))
