"""Foreign feature folders joined into regions: TRIDENT's layout, and what lies on no common grid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pathme_tiny
from data_prep.regions import main
from pathme_jax.data.pipeline import batches, open_source, shapes
from pathme_jax.encoders.encoder import Encoder
from pathme_jax.encoders.region_extraction import extract_regions
from pathme_jax.errors import UserError
from pathme_jax.files import read_json
from pathme_jax.records import features
from pathme_jax.records.foreign import join_folders
from pathme_jax.records.regions import RegionSource
from pathme_jax.training.contract import load_method

SIZE = (512 * 36, 512 * 20)  # level-0 px of a 40x scan: 2 × 1 regions of 16 tiles, and margins


def grid(columns: int, rows: int) -> np.ndarray:
    """(n, 2) column, row of a full grid."""
    return np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)


def put(folder: Path, slide: str, coords: np.ndarray, values: np.ndarray, **changes: Any) -> Path:
    """A file as TRIDENT 0.3 writes it: chunks of one row, numbers as floats."""
    folder.mkdir(parents=True, exist_ok=True)
    magnification = float(folder.parent.name.split("x_")[0])
    attrs: dict[str, Any] = {
        **{"patch_size": 256, "patch_size_level0": np.float64(256 * 40 / magnification)},
        **{"level0_magnification": 40, "target_magnification": np.float64(magnification)},
        **{"overlap": 0, "name": slide, "savetodir": str(folder)},
        **{"level0_width": SIZE[0], "level0_height": SIZE[1], **changes},
    }
    with h5py.File(folder / f"{slide}.h5", "w") as file:
        width = values.shape[1]
        data = file.create_dataset(
            "features", data=values, chunks=(1, width), maxshape=(None, width)
        )
        data.attrs.update({"name": slide, "savetodir": str(folder), "encoder": "uni_v1"})
        place = file.create_dataset("coords", data=np.asarray(coords, np.int64))
        place.attrs.update({k: v for k, v in attrs.items() if v is not None})
    return folder / f"{slide}.h5"


def folder_of(root: Path, magnification: int, encoder: str = "uni_v1") -> Path:
    return root / f"{magnification}x_256px_0px_overlap" / f"features_{encoder}"


def put_both(root: Path, slide: str, shift: int = 0, **changes: Any) -> None:
    """Fine and coarse features that hold their own column and row; nothing right of column 31."""
    for magnification, step, cells in ((20, 512, grid(32, 20)), (5, 2048, grid(8, 5))):
        values = cells.astype(np.float32)
        put(folder_of(root, magnification), slide, cells * step + shift, values, **changes)


def join(root: Path, out: Path, experts: tuple[str, ...] = ()):
    folders = [folder_of(root, 20, name) for name in experts]
    return join_folders(folder_of(root, 20), folder_of(root, 5), folders, out, progress=False)


def test_each_cell_gets_the_feature_of_the_tile_that_lies_there(tmp_path: Path):
    put_both(tmp_path / "t", "b")
    put_both(tmp_path / "t", "a")
    gone = folder_of(tmp_path / "t", 20)
    cells = np.delete(grid(32, 20), 32 * 3 + 17, 0)[
        ::-1
    ]  # in another order; column 17, row 3 is glass
    put(gone, "a", cells * 512, cells.astype(np.float16))
    joined = join(tmp_path / "t", tmp_path / "out")
    assert not joined.errors and joined.regions == 4
    source = RegionSource(joined.folder, {"fine": "uni_v1@20x", "coarse": "uni_v1@5x"})
    assert source.index.slide_id.tolist() == ["a", "a", "b", "b"]
    assert source.index.grid.tolist() == [[0, 0], [0, 4]] * 2
    assert source.index.slide_mpp.tolist() == [0.25] * 4
    item = source[1]
    assert np.argwhere(~item["fine_valid"]).tolist() == [[3, 1]]
    rows, columns = np.mgrid[0:16, 16:32]
    expected = np.where(item["fine_valid"][..., None], np.stack([columns, rows], -1), 0)
    np.testing.assert_array_equal(item["fine"], expected)
    rows, columns = np.mgrid[0:4, 4:8]
    np.testing.assert_array_equal(item["coarse"], np.stack([columns, rows], -1))
    recipe = read_json(joined.folder.parent / "recipe.json")
    assert recipe["mpp"] == 0.5 and recipe["tile_px"] == 256


def test_a_rerun_writes_nothing_and_tells_the_same(tmp_path: Path):
    put_both(tmp_path / "t", "a")
    put_both(tmp_path / "t", "b")
    bad = np.full((640, 2), np.nan, np.float32)
    path = put(folder_of(tmp_path / "t", 20), "b", grid(32, 20) * 512, bad)
    first = join(tmp_path / "t", tmp_path / "out")
    assert [e["slide_id"] for e in first.errors] == ["b"] and "NaN" in first.errors[0]["reason"]
    before = (first.folder / "index.npz").stat().st_mtime_ns
    assert join(tmp_path / "t", tmp_path / "out") == first
    assert (first.folder / "index.npz").stat().st_mtime_ns == before
    put(path.parent, "b", grid(32, 20) * 512, np.ones((640, 2), np.float32))
    again = join(tmp_path / "t", tmp_path / "out")
    assert again.folder != first.folder and not again.errors and again.regions == 4


@pytest.mark.parametrize(
    ("rounded", "said", "fits"),
    [
        ("each", "exact", True),
        ("step", "rounded", True),
        ("step", "exact", True),
        ("both", "rounded", False),
    ],
)
def test_tiles_of_no_whole_number_of_pixels(tmp_path: Path, rounded: str, said: str, fits: bool):
    """256 px at 0.5 µm/px of a scan at 0.2523: 507.33 px. Rounding fine and coarse steps singly drifts."""
    exact = 256 * 0.5 / 0.2523
    for magnification, multiple, cells in ((20, 1, grid(32, 20)), (5, 4, grid(8, 5))):
        step = {
            "each": multiple * exact,
            "step": multiple * round(exact),
            "both": round(multiple * exact),
        }[rounded]
        coords = np.round(cells * step)
        level0_px = np.float64(multiple * exact if said == "exact" else step)
        values = cells.astype(np.float32)
        folder = folder_of(tmp_path / "t", magnification)
        put(folder, "a", coords, values, patch_size_level0=level0_px)
    if not fits:
        with pytest.raises(UserError, match=r"lies \+7, \+0 px off the grid of 2028 px"):
            join(tmp_path / "t", tmp_path / "out")
        return
    joined = join(tmp_path / "t", tmp_path / "out")
    source = RegionSource(joined.folder, {"fine": "uni_v1@20x"})
    rows, columns = np.mgrid[0:16, 16:32]
    np.testing.assert_array_equal(source[1]["fine"], np.stack([columns, rows], -1))


def test_our_own_folders_are_joined_by_their_exact_mpp(tmp_path: Path):
    """507.33 px again; the attribute patch_size_level0 is rounded, mpp and level0_mpp are not."""
    for magnification, mpp, cells in ((20, 0.5, grid(32, 20)), (5, 2.0, grid(8, 5))):
        attrs = features.coordinate_attrs(slide_id="a", mpp=mpp, slide_mpp=0.2523, level0_size=SIZE)
        features.write_features(
            folder_of(tmp_path, magnification) / "a.h5",
            features=cells.astype(np.float32),
            coords=np.round(cells * 256 * mpp / 0.2523),
            grid=cells[:, ::-1],
            attrs={**attrs, "encoder": "e", "recipe": "r"},
        )
    joined = join(tmp_path, tmp_path / "out")
    source = RegionSource(joined.folder, {"fine": "uni_v1@20x"})
    assert source.index.slide_mpp[0] == pytest.approx(0.2523)
    np.testing.assert_array_equal(source[1]["fine"][0, :, 0], np.arange(16, 32))


def test_licences_are_kept_of_folders_that_tell_them(tmp_path: Path):
    put_both(tmp_path / "t", "a")
    told = [{"name": "uni_v1", "licence": "CC-BY-NC-ND-4.0"}]
    with h5py.File(folder_of(tmp_path / "t", 5) / "a.h5", "r+") as file:
        file["features"].attrs["made_from"] = json.dumps(told)
    recipe = read_json(join(tmp_path / "t", tmp_path / "out").folder / "recipe.json")
    assert recipe["made_from"] == {"uni_v1@20x": [], "uni_v1@5x": told}


def test_a_shifted_grid_costs_its_slide_and_the_offset_is_named(tmp_path: Path):
    put_both(tmp_path / "t", "a")
    put_both(tmp_path / "t", "b", shift=100)
    joined = join(tmp_path / "t", tmp_path / "out")
    (error,) = joined.errors
    assert error["slide_id"] == "b" and joined.regions == 2
    assert "lies +100, +100 px off the grid of 512 px" in error["reason"]
    assert "slide's corner" in error["cure"]


def test_a_coarse_grid_shifted_by_itself_is_refused(tmp_path: Path):
    put_both(tmp_path / "t", "a")
    cells = grid(8, 5)
    shifted = cells * 2048 + [512, 0]
    put(folder_of(tmp_path / "t", 5), "a", shifted, cells.astype(np.float32))
    with pytest.raises(UserError, match=r"5x_.*lies \+512, \+0 px off the grid of 2048 px"):
        join(tmp_path / "t", tmp_path / "out")


def test_clams_features_are_named_with_the_cure(tmp_path: Path):
    put_both(tmp_path / "t", "a")
    path = put(folder_of(tmp_path / "t", 20), "a", grid(2, 2) * 512, np.ones((4, 2)))
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = np.ones((4, 2), np.float32), np.zeros((4, 2), np.int32)
    with pytest.raises(UserError, match=r"lacks the attributes patch_size, .*data_prep\.tile"):
        join(tmp_path / "t", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overlap": 64}, "overlap by 64 px"),
        ({"level0_width": None}, "lacks the attributes level0_width"),
        (
            {"target_magnification": 10.0},
            "256 px at 10x, 2 wide, most of that folder 256 px at 20x",
        ),
        ({"patch_size": 224}, "224 px at 20x"),
        ({"coords": np.zeros((640, 2))}, "639 tiles are there twice"),
        ({"coords": grid(32, 19) * 512}, "features of shape (640, 2), 608 coordinates"),
        ({"values": np.ones((640, 3), np.float32)}, "3 wide, most of that folder"),
        ({"level0_width": 4000}, "no whole region of 2048 µm holds a tile (the slide is 1000 × "),
        ({"coords": np.zeros((0, 2)), "values": np.zeros((0, 2), np.float32)}, "holds no tiles"),
    ],
)
def test_a_bad_file_costs_its_slide_alone(tmp_path: Path, changes: dict[str, Any], message: str):
    for slide in "abc":
        put_both(tmp_path / "t", slide)
    what = {"coords": grid(32, 20) * 512, "values": np.ones((640, 2), np.float32), **changes}
    put(folder_of(tmp_path / "t", 20), "b", what.pop("coords"), what.pop("values"), **what)
    joined = join(tmp_path / "t", tmp_path / "out")
    (error,) = joined.errors
    assert error["slide_id"] == "b" and message in error["reason"] and joined.regions == 4


def test_a_slide_without_one_of_the_files_or_with_a_damaged_one_is_listed(tmp_path: Path):
    for slide in "abc":
        put_both(tmp_path / "t", slide)
    (folder_of(tmp_path / "t", 5) / "b.h5").unlink()
    path = folder_of(tmp_path / "t", 20) / "c.h5"
    path.write_bytes(path.read_bytes()[:1000])
    joined = join(tmp_path / "t", tmp_path / "out")
    reasons = {e["slide_id"]: e["reason"] for e in joined.errors}
    assert list(reasons) == ["b", "c"] and joined.regions == 2
    assert "b.h5: missing" in reasons["b"] and "not a feature file" in reasons["c"]


def test_folders_that_do_not_fit_together_are_named(tmp_path: Path):
    put_both(tmp_path / "t", "a")
    cells = grid(16, 10)
    put(folder_of(tmp_path / "t", 10), "a", cells * 1024, cells.astype(np.float32))
    fine, tenfold = folder_of(tmp_path / "t", 20), folder_of(tmp_path / "t", 10)
    with pytest.raises(UserError, match="256 px at 10x, expected 256 px at 5x"):
        join_folders(fine, tenfold, [], tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="would both be column uni_v1@20x"):
        join_folders(fine, folder_of(tmp_path / "t", 5), [fine], tmp_path / "out", progress=False)
    with pytest.raises(UserError, match=r"no feature files .*features_uni_v1"):
        join_folders(tmp_path, fine, [], tmp_path / "out", progress=False)


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """Regions of slides a, b and c, each a pixel wider, of an encoder and an expert."""
    rng = np.random.default_rng(0)
    for i, slide in enumerate("abc"):
        put_both(tmp_path / "t", slide, level0_width=SIZE[0] + i)
        values = rng.normal(size=(640, 3)).astype(np.float32)
        put(folder_of(tmp_path / "t", 20, "expert"), slide, grid(32, 20) * 512, values)
    return join(tmp_path / "t", tmp_path / "out", experts=("expert",)).folder


def test_pathme_takes_them(joined: Path):
    """A batch of them, through the model to the loss; traced, since compiling takes half a minute."""
    config = pathme_tiny.get_config("test")
    config.columns = dict(fine="uni_v1@20x", coarse="uni_v1@5x", experts={"expert": "expert@20x"})
    method, key = load_method(config), jax.random.key(0)
    spec = method.batch_spec
    batch = next(batches(joined, spec, seed=0, threads=1))

    def loss(batch: Any) -> Any:
        keys = jax.random.split(key, spec.samples)
        params, aux = method.init(key, shapes(open_source(joined, spec), spec))
        return method.loss(params, aux, method.views(batch, keys), keys, jnp.zeros((), int))[0]

    assert jax.eval_shape(loss, batch).shape == ()
    assert batch["fine_valid"].all() and np.ptp(batch["fine"]) == 31


def hand_on_coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in encoder that hands on its regions' coarse features, which are column and row."""

    def encode(_: Any, batch: Any) -> dict[str, Any]:
        count = len(batch["coarse"])
        return {
            "features": batch["coarse"].reshape(count, 16, 2),
            "valid": batch["coarse_valid"].reshape(count, 16),
            "cell": np.argwhere(np.ones((4, 4))),
            "kind": np.zeros(16, np.uint8),
        }

    stand_in = Encoder("copy", "regions", {"coarse": "uni_v1@5x"}, {}, encode)
    monkeypatch.setattr("pathme_jax.encoders.region_extraction.load", lambda *_: stand_in)
    monkeypatch.setattr(Encoder, "encode", lambda self, batch: self.apply(None, batch))


def test_a_region_encoders_tokens_lie_where_the_tiles_lay(joined: Path, monkeypatch):
    hand_on_coarse(monkeypatch)
    done = extract_regions(joined, "copy", progress=False)
    assert done.done == 3 and not done.errors
    (((_, mpp), folder),) = done.folders.items()
    bag = features.read_features(folder / "b.h5")
    assert mpp == 2.0 and len(bag.features) == 32
    np.testing.assert_array_equal(bag.coords, bag.features * 2048)
    assert bag.attrs["level0_width"] == SIZE[0] + 1 and bag.attrs["patch_size_level0"] == 2048


def test_regions_away_from_their_grid_are_told(joined: Path, tmp_path: Path, monkeypatch):
    hand_on_coarse(monkeypatch)
    away = joined.rename(tmp_path / joined.name)
    with pytest.raises(UserError, match=r"recipe\.json: missing, so the size of these"):
        extract_regions(away, "copy", progress=False)


def test_cohorts_that_share_a_folder_keep_their_slides_sizes(tmp_path: Path, monkeypatch):
    """A second cohort's slide of the same id, on the same grid: scanned at 20x, and smaller."""
    first = tmp_path / "first"
    put_both(first, "a")
    size = {"level0_magnification": 20, "level0_width": 256 * 17, "level0_height": 256 * 18}
    for magnification, step, cells in ((20, 256, grid(16, 16)), (5, 1024, grid(4, 4))):
        folder = folder_of(tmp_path / "second", magnification)
        values = cells.astype(np.float32)
        put(folder, "a", cells * step, values, patch_size_level0=np.float64(step), **size)
    one = join(first, tmp_path / "out").folder
    other = join(tmp_path / "second", tmp_path / "out").folder
    assert one.parent == other.parent and one != other
    hand_on_coarse(monkeypatch)
    for folder, (width, height), mpp in (
        (one, SIZE, 0.25),
        (other, (256 * 17, 256 * 18), 0.5),
    ):
        done = extract_regions(folder, "copy", out=tmp_path / folder.name, progress=False)
        bag = features.read_features(next(iter(done.folders.values())) / "a.h5")
        assert (bag.attrs["level0_width"], bag.attrs["level0_height"]) == (width, height)
        assert bag.attrs["level0_mpp"] == mpp
        np.testing.assert_array_equal(bag.coords, bag.features * 512 / mpp)


def test_the_launcher_takes_folders(tmp_path: Path, capsys):
    put_both(tmp_path / "t", "a")
    given = ["--out", tmp_path / "out", "--fine", folder_of(tmp_path / "t", 20)]
    main([str(a) for a in (*given, "--coarse", folder_of(tmp_path / "t", 5))])
    told = capsys.readouterr().out
    assert "2 regions, 0 slides left out" in told and "regions-" in told
    for wrong in (given, given[2:]):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in wrong])
        assert end.value.code == 2
