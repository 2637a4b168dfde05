"""Feature files in TRIDENT's layout, ours and other tools'."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathme_jax.errors import UserError
from pathme_jax.records import features


def written(path: Path, **changes) -> Path:
    what = {
        "features": np.arange(6, dtype=np.float32).reshape(3, 2),
        "coords": np.array([[0, 1], [2, 3], [4, 5]]),
        "grid": np.array([[0, 0], [0, 1], [1, 0]]),
        "attrs": {
            **features.coordinate_attrs(slide_id="s", mpp=0.5, slide_mpp=0.25, level0_size=(9, 8)),
            "encoder": "e", "recipe": "abc",
        },
        **changes,
    }  # fmt: skip
    features.write_features(path, **what)
    return path


def test_tridents_names_types_and_attributes(tmp_path: Path):
    """The names TRIDENT 0.3's readers use: read here with h5py alone."""
    with h5py.File(written(tmp_path / "s.h5")) as file:
        data, coords = file["features"], file["coords"]
        assert isinstance(data, h5py.Dataset) and isinstance(coords, h5py.Dataset)
        assert data.chunks is None and data.dtype == np.float32  # contiguous: reads fast
        assert coords.dtype == np.int64 and coords.shape == (3, 2)
        assert data.attrs["encoder"] == "e"
        expected = {
            "patch_size": 256, "patch_size_level0": 512, "target_magnification": 20.0,
            "level0_magnification": 40.0, "overlap": 0, "name": "s",
            "level0_width": 9, "level0_height": 8,
        }  # fmt: skip
        assert {k: coords.attrs[k] for k in expected} == expected


def test_what_is_written_is_read(tmp_path: Path):
    bag = features.read_features(written(tmp_path / "s.h5", kind=np.array([0, 0, 1])))
    assert bag.slide_id == "s" and bag.features.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert bag.kind.tolist() == [0, 0, 1] and bag.grid is not None and bag.grid.shape == (3, 2)
    assert features.recipe_of(tmp_path / "s.h5") == "abc"
    assert features.recipe_of(tmp_path / "absent.h5") is None


def test_clams_and_tridents_own_files_are_read(tmp_path: Path):
    with h5py.File(
        tmp_path / "clam.h5", "w"
    ) as file:  # (1, n, d), int32 coordinates, no attributes
        file["features"] = np.ones((1, 4, 3), np.float32)
        file["coords"] = np.zeros((4, 2), np.int32)
    with h5py.File(tmp_path / "trident.h5", "w") as file:
        file.create_dataset("features", data=np.ones((4, 3), np.float16), chunks=(1, 3))
        file.create_dataset("coords", data=np.zeros((4, 2))).attrs["patch_size_level0"] = 512.0
    for name in ("clam", "trident"):
        bag = features.read_features(tmp_path / f"{name}.h5")
        assert bag.features.shape == (4, 3) and bag.features.dtype == np.float32
        assert bag.grid is None and bag.coords.dtype == np.int64


def test_nan_is_refused_on_both_ways_and_leaves_no_file(tmp_path: Path):
    bad = np.array([[1.0, np.nan], [1, 1], [1, 1]], np.float32)
    with pytest.raises(UserError, match="1 of 3 feature rows"):
        written(tmp_path / "s.h5", features=bad)
    assert not list(tmp_path.iterdir())
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["features"], file["coords"] = bad, np.zeros((3, 2))
    with pytest.raises(UserError, match=r"t\.h5: features hold NaN"):
        features.read_features(tmp_path / "t.h5")


def test_a_truncated_or_foreign_file_is_named(tmp_path: Path):
    path = written(tmp_path / "s.h5")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="not a feature file"):
        features.read_features(path)
    with pytest.raises(UserError, match="3 features, 3 coordinates, 2 cells"):
        written(tmp_path / "t.h5", grid=np.zeros((2, 2)))


@given(st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0, 8.0]))
def test_folder_names_are_tridents(mpp: float):
    assert features.folder_name(mpp) == f"{10 / mpp:g}x_256px_0px_overlap"


def rows_of_one_chunk_each(path: Path, values: np.ndarray, **options) -> Path:
    """As TRIDENT writes them: grown batch by batch, in chunks of one row."""
    with h5py.File(path, "w") as file:
        shape = (None, values.shape[1])
        data = file.create_dataset(
            "features", data=values[:1], chunks=(1, values.shape[1]), maxshape=shape, **options
        )
        file["coords"] = np.zeros((len(values), 2), np.int64)
        for start in range(1, len(values), 7):
            part = values[start : start + 7]
            data.resize(start + len(part), axis=0)
            data[start:] = part
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}])
def test_row_chunks_are_read_as_hdf5_reads_them(tmp_path: Path, dtype, options):
    values = np.random.default_rng(0).normal(size=(2000, 48)).astype(dtype)
    path = rows_of_one_chunk_each(tmp_path / "s.h5", values, **options)
    bag = features.read_features(path, dtype=None)
    np.testing.assert_array_equal(bag.features, values)
    assert bag.features.dtype == dtype


def test_row_chunks_that_nobody_wrote_are_zeros(tmp_path: Path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        data = file.create_dataset("features", (9, 4), np.float32, chunks=(1, 4))
        data[3] = 5
        file["coords"] = np.zeros((9, 2))
    read = features.read_features(tmp_path / "s.h5").features
    assert read.sum(1).tolist() == [0, 0, 0, 20, 0, 0, 0, 0, 0]


def test_a_slide_without_tissue_is_read(tmp_path: Path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("features", (0, 4), np.float16, chunks=(1, 4), maxshape=(None, 4))
        file["coords"] = np.zeros((0, 2))
    assert features.read_features(tmp_path / "s.h5").features.shape == (0, 4)


def test_a_group_of_encoders_is_no_feature_file(tmp_path: Path):
    with h5py.File(tmp_path / "s.h5", "w") as file:  # AtlasPatch's layout
        file["features/uni"], file["coords"] = np.ones((2, 4)), np.zeros((2, 5))
    with pytest.raises(UserError, match="not a feature file"):
        features.read_features(tmp_path / "s.h5")


def every_float16() -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(np.float16)


def test_every_finite_float16_is_widened_exactly(tmp_path: Path):
    values = every_float16()
    values = values[np.isfinite(values)][:, None]
    zeros = np.zeros((len(values), 2), np.int64)
    written(tmp_path / "s.h5", features=values, coords=zeros, grid=zeros)
    read = features.read_features(tmp_path / "s.h5").features
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read.view(np.uint32), values.astype(np.float32).view(np.uint32))
    kept = features.read_features(tmp_path / "s.h5", dtype=None).features
    assert kept.dtype == np.float16 and kept.tobytes() == values.tobytes()


def test_every_float16_that_is_not_finite_is_found():
    for value in every_float16():
        assert features._finite(np.array([[0, value]], np.float16)) == np.isfinite(value)


def test_finite_values_whose_sum_overflows_are_finite():
    large = np.full((4, 4), np.finfo(np.float32).max)
    assert features._finite(large)
    for bad in (np.nan, np.inf, -np.inf):
        large[1, 1] = bad
        assert not features._finite(large)
    assert not features._finite(np.array([[np.inf, -np.inf]], np.float32))
