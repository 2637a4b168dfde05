"""Joining features into regions: arithmetic on grid indices, and missing tissue is masked."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.files import read_json, write_csv, write_json
from pathme_jax.records import features, fields
from pathme_jax.records.join import Slide, column_name, join, write
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
    write_json(tmp_path / "recipe.json", {"mpp": 0.5, "tile_px": 256})
    write_csv(tmp_path / "slides.csv", [{"slide_id": "a", "state": "done"}], ["slide_id", "state"])
    return tmp_path


def put(
    grid: Path, encoder: str, mpp: float, cells: np.ndarray, values: np.ndarray, px: int = 256
) -> None:
    features.write_features(
        grid / features.folder_name(mpp, px) / f"features_{encoder}" / "a.h5",
        features=values,
        coords=cells[:, ::-1],
        grid=cells,
        attrs={"encoder": encoder, "recipe": f"{encoder}{mpp}"},
    )


def bag(slide: str, cells: np.ndarray, values: np.ndarray, **attrs: Any) -> features.Bag:
    kind = np.zeros(len(cells), np.uint8)
    return features.Bag(slide, values, cells[:, ::-1], cells, kind, attrs)


def write_bags(folder: Path, bags: Sequence[dict[str, features.Bag]], regions: int = 2) -> Any:
    """Regions side by side, of bags that each hold one slide's columns, all of the finest tiles."""
    anchors = np.array([(0, 4 * i) for i in range(regions)])
    named = {next(iter(columns.values())).slide_id: columns for columns in bags}
    return write(
        folder,
        [Slide(slide_id, anchors, 0.25, (8192, 4096)) for slide_id in named],
        {name: 16 for name in bags[0]},
        lambda slide_id, name: named[slide_id][name],
        made_of={slide_id: {name: "r" for name in bags[0]} for slide_id in named},
        mpp=0.5,
        progress=False,
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


def test_means_and_deviations_are_those_of_all_slides_at_once(tmp_path: Path):
    """Slides of other means, far from zero, with tissue of other extents, and one without any."""
    rng = np.random.default_rng(2)
    cells = cells_of(range(16), range(32))
    bags = [
        {"e": bag(slide, cells[: 100 * i], rng.normal(900 + 50 * i, 2, (100 * i, 3)))}
        for i, slide in enumerate("abc", 1)
    ]
    outside = cells[:4] + np.array([100, 0])
    bags.append({"e": bag("d", outside, np.ones((4, 3), np.float16))})
    joined = write_bags(tmp_path, bags)
    assert joined.regions == 8 and not joined.errors
    assert not RegionSource(joined.folder, {}).index.valid["e"][6:].any()
    stored = np.concatenate([b["e"].features for b in bags[:3]]).astype(np.float16)
    (column,) = read_json(joined.folder / "recipe.json")["columns"]
    assert column["mean"] == np.round(stored.astype(np.float64).mean(0), 6).tolist()
    assert column["std"] == np.round(stored.astype(np.float64).std(0), 6).tolist()


def test_a_bad_slide_leaves_nothing_of_itself(tmp_path: Path):
    """Of the third slide the second column is bad, so that nothing of its first may be stored."""
    cells = cells_of(range(16), range(32))
    good = np.ones((512, 2), np.float32)
    faults = {
        "c": (bag("c", cells, np.ones((512, 3), np.float32)), "is 3 wide, earlier slides 2"),
        "d": (bag("d", cells, good * 1e6), "exceed 65504, the largest float16"),
        "e": (bag("e", cells[:0], good[:0]), "holds no features"),
        "f": (bag("f", cells[:9], good), "512 features, `grid` has 9 rows"),
    }
    bags = [{"e": bag(s, cells, good), "h": bag(s, cells, good)} for s in "ab"]
    bags += [{"e": bag(s, cells, good * 9), "h": found} for s, (found, _) in faults.items()]
    bags.append({"e": bag("g", cells, good * 2), "h": bag("g", cells, good * 3)})
    joined = write_bags(tmp_path, bags)
    assert [error["slide_id"] for error in joined.errors] == list(faults)
    for error in joined.errors:
        assert faults[error["slide_id"]][1] in error["reason"]
    source = RegionSource(joined.folder, {"fine": "e", "h": "h"})
    assert source.index.slide_id.tolist() == list("aabbgg")
    assert [source[i]["fine"].mean() for i in range(6)] == [1, 1, 1, 1, 2, 2]
    assert [source[i]["h"].mean() for i in range(6)] == [1, 1, 1, 1, 3, 3]
    means = {c["name"]: c["mean"][0] for c in read_json(joined.folder / "recipe.json")["columns"]}
    assert means == {"e": pytest.approx(4 / 3, abs=1e-6), "h": pytest.approx(5 / 3, abs=1e-6)}
    only_bad = tmp_path / "bad"
    with pytest.raises(UserError, match=r"none of the 1 slides could be joined; e: e\.h5 holds"):
        write_bags(only_bad, [bags[4]])
    assert not list(only_bad.iterdir())


def test_memory_does_not_grow_with_the_number_of_slides(tmp_path: Path):
    """24 slides of 4 MB; regions of 0.5 MB in float16, of which statistics in float64 take a few more."""
    cells = cells_of(range(16), range(128))
    values = np.ones((len(cells), 1024), np.float16)
    bags = [{"e": bag(f"{i:02}", cells, values)} for i in range(24)]
    tracemalloc.start()
    joined = write_bags(tmp_path, bags, regions=8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert joined.regions == 24 * 8 and peak < 24 * values.nbytes / 4


def test_tiles_of_another_side_are_found_in_their_folder(grid: Path):
    write_json(grid / "recipe.json", {"mpp": 0.5, "tile_px": 224})
    cells = cells_of(range(16), range(16, 32))
    put(grid, "e", 0.5, cells, cells.astype(np.float32), px=224)
    put(grid, "e", 0.5, cells, np.zeros((256, 2), np.float32))  # another grid's
    item = RegionSource(join(grid, [("e", 1)], progress=False).folder, {"fine": "e@20x"})[0]
    np.testing.assert_array_equal(item["fine"], cells.reshape(16, 16, 2))


def test_licences_of_the_encoders_are_kept_with_the_columns(tmp_path: Path):
    """All that the slides' files tell, once; a folder of them has the name and identity of one without."""
    cells, values = cells_of(range(16), range(32)), np.ones((512, 2), np.float32)
    uni = {"name": "uni", "licence": "CC-BY-NC-ND-4.0", "source": "MahmoodLab/UNI"}
    student = {"name": "student", "licence": "MIT"}

    def bags(*told: dict[str, str]) -> list[dict[str, features.Bag]]:
        return [
            {"e": bag(s, cells, values, **told[i]), "h": bag(s, cells, values)}
            for i, s in enumerate("ab")
        ]

    one, both = ({"made_from": json.dumps(x)} for x in ([uni], [uni, student]))
    told = write_bags(tmp_path / "told", bags(one, both)).folder
    untold = write_bags(tmp_path / "untold", bags({}, {})).folder
    assert read_json(told / "recipe.json")["made_from"] == {"e": [uni, student], "h": []}
    assert read_json(untold / "recipe.json")["made_from"] == {"e": [], "h": []}
    assert told.name == untold.name
    assert repr(RegionSource(told, {})) == repr(RegionSource(untold, {}))


@pytest.mark.parametrize("gone", ["recipe.json", "index.npz"])
def test_a_folder_without_all_of_it_holds_no_regions_and_is_made_again(grid: Path, gone: str):
    put(grid, "e", 0.5, cells_of(range(16), range(16, 32)), np.ones((256, 2), np.float32))
    folder = join(grid, [("e", 1)], progress=False).folder
    (folder / gone).unlink()
    with pytest.raises(UserError, match=r"no regions here \(expected recipe.json and index.npz\)"):
        RegionSource(folder, {})
    assert join(grid, [("e", 1)], progress=False).folder == folder
    assert len(RegionSource(folder, {})) == 1


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
