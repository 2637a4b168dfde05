"""Joining features into regions: arithmetic on grid indices, and missing tissue is masked."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.files import write_csv, write_json
from pathme_jax.records import features, fields
from pathme_jax.records.join import column_name, join
from pathme_jax.records.regions import RegionSource


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """One slide, one region at fields (0…3, 4…7); two fields have no tissue."""
    view = {
        "image": fields.encode(np.zeros((256, 256, 3), np.uint8)), "slide_id": "a", "grid": (0, 4),
        "level0_xy": (0, 0), "level0_size": (4096, 4096), "mpp": 8.0, "slide_mpp": 0.5,
        "fields": np.ones((4, 4), bool), "recipe": "r",
    }  # fmt: skip
    shard = fields.write_shard(
        tmp_path / "views" / "a.array_record", [fields.serialise(fields.VIEWS, view)]
    )
    sidecar = {
        "slide_id": "a", "slide_mpp": 0.5, "level0_size": [4096, 4096], "views": shard, "fields": shard
    }  # fmt: skip
    write_json(tmp_path / "fields" / "a.json", sidecar)
    write_json(tmp_path / "recipe.json", {"mpp": 0.5})
    write_csv(tmp_path / "slides.csv", [{"slide_id": "a", "state": "done"}], ["slide_id", "state"])
    return tmp_path


def put(grid: Path, encoder: str, mpp: float, cells: np.ndarray, values: np.ndarray) -> None:
    features.write_features(
        grid / features.folder_name(mpp) / f"features_{encoder}" / "a.h5",
        features=values,
        coords=cells[:, ::-1],
        grid=cells,
        attrs={"encoder": encoder, "recipe": f"{encoder}{mpp}"},
    )


def cells_of(rows: range, columns: range) -> np.ndarray:
    return np.array([(r, c) for r in rows for c in columns], np.int32)


def test_each_cell_gets_the_feature_of_its_own_tile(grid: Path):
    """A feature that holds its own row and column must end in that cell, whatever the file's order."""
    rng = np.random.default_rng(0)
    fine = rng.permutation(cells_of(range(0, 20), range(10, 40)))
    fine = fine[~((fine[:, 0] == 3) & (fine[:, 1] == 17))]  # one tile has no tissue
    put(grid, "e", 0.5, fine, fine.astype(np.float32))
    coarse = cells_of(range(0, 5), range(3, 9))[::-1]
    put(grid, "e", 2.0, coarse, coarse.astype(np.float32))
    put(grid, "e", 8.0, np.array([[0, 4], [0, 8]], np.int32), np.array([[7.0], [9]], np.float32))
    joined = join(grid, [("e", 1), ("e", 4), ("e", 16)], progress=False)
    assert joined.regions == 1 and not joined.errors
    source = RegionSource(joined.folder, {"fine": "e@20x", "coarse": "e@5x", "view": "e@1.25x"})
    item = source[0]
    missing = ~item["fine_valid"]
    assert np.argwhere(missing).tolist() == [[3, 1]] and (item["fine"][missing] == 0).all()
    rows, columns = np.mgrid[0:16, 16:32]
    expected = np.where(missing[..., None], 0, np.stack([rows, columns], -1))
    np.testing.assert_array_equal(item["fine"], expected)
    np.testing.assert_array_equal(item["coarse"], np.stack(np.mgrid[0:4, 4:8], -1))
    assert item["coarse_valid"].all() and item["view"].item() == 7
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[0]["fine"], item["fine"])
    assert repr(again) == repr(source)


def test_experts_are_standardised_over_tissue_only(grid: Path):
    fine = cells_of(range(0, 16), range(16, 24))  # half of the region
    values = np.random.default_rng(1).normal(5, 3, (len(fine), 2)).astype(np.float32)
    put(grid, "h", 0.5, fine, values)
    folder = join(grid, [("h", 1)], progress=False).folder
    item = RegionSource(folder, {"experts/h": "h@20x"})[0]
    tissue = item["experts/h"][item["experts/h_valid"]]
    np.testing.assert_allclose(tissue.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(tissue.std(0), 1, atol=1e-2)
    assert (item["experts/h"][~item["experts/h_valid"]] == 0).all()


def test_a_slide_without_one_of_the_columns_is_listed(grid: Path):
    put(grid, "e", 0.5, cells_of(range(16), range(16, 32)), np.ones((256, 2), np.float32))
    with pytest.raises(UserError, match="no slide has both"):
        join(grid, [("e", 1), ("x", 4)], progress=False)
    with pytest.raises(UserError, match=r"no column 'x@20x'"):
        RegionSource(join(grid, [("e", 1)], progress=False).folder, {"fine": "x@20x"})
    with pytest.raises(UserError, match="no regions here"):
        RegionSource(grid, {})


def test_a_changed_feature_file_makes_another_folder(grid: Path):
    cells = cells_of(range(16), range(16, 32))
    put(grid, "e", 0.5, cells, np.ones((256, 2), np.float32))
    first = join(grid, [("e", 1)], progress=False).folder
    assert join(grid, [("e", 1)], progress=False).folder == first
    path = grid / features.folder_name(0.5) / "features_e" / "a.h5"
    attrs = {"encoder": "e", "recipe": "other"}
    features.write_features(
        path, features=np.zeros((256, 2)), coords=cells, grid=cells, attrs=attrs
    )
    assert join(grid, [("e", 1)], progress=False).folder != first


def test_columns_are_named_by_magnification():
    assert [column_name("e", mpp) for mpp in (0.5, 1.0, 2.0, 8.0)] == [
        "e@20x", "e@10x", "e@5x", "e@1.25x"
    ]  # fmt: skip
