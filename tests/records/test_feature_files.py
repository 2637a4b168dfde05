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
