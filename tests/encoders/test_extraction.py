"""Extraction: the right pixels, in the right rows, and nothing done twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.data.stores import FieldStore
from pathme_jax.encoders import descriptors, encoder, extraction, patch, zoo
from pathme_jax.encoders.devices import Devices
from pathme_jax.encoders.extraction import (
    describe,
    extract_fields,
    extract_slides,
    multiples_of,
    parse_mpps,
    slide_store,
)
from pathme_jax.encoders.zoo import Definition, Input
from pathme_jax.errors import UserError
from pathme_jax.extract import main
from pathme_jax.files import read_csv
from pathme_jax.records import features, fields
from pathme_jax.slides import images

QUIET = {"progress": False, "dtype": "float32", "workers": 0}
SMALL = {"tile_px": 32, "mpps": [0.5, 2.0, 8.0]}  # fields of 128 px: for slides of 1100


@pytest.fixture(scope="module")
def extracted(grid_dir: Path):
    return extract_fields(grid_dir, ["hed_texture", "mean_rgb"], batch=32, **QUIET)


def bags(folder: Path) -> dict[str, features.Bag]:
    return {path.stem: features.read_features(path) for path in sorted(folder.glob("*.h5"))}


def files(root: Path) -> dict[str, bytes]:
    """All feature files, whole."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("features_*/*.h5")}


def test_features_are_those_of_the_tiles_pixels(grid_dir: Path, extracted):
    """Mean colours recomputed from the stored fields, at all three magnifications."""
    source, views = fields.FieldSource(grid_dir), fields.ViewSource(grid_dir)
    slide = source.slide_ids[0]
    made = {k: features.read_features(p / f"{slide}.h5") for k, p in extracted.folders.items()}
    fine, coarse = made["mean_rgb", 0.5], made["mean_rgb", 2.0]
    row = 0
    for i in source.ranges[slide]:  # rows: field by field, and child by child within one
        record = source[i]
        image, cell = fields.decode(record["image"]), record["grid"]
        k = i - source.ranges[slide].start
        assert coarse.grid is not None and coarse.grid[k].tolist() == cell.tolist()
        np.testing.assert_allclose(coarse.features[k], image.mean((0, 1)) / 255, atol=2e-3)
        for r, c in np.argwhere(record["tissue"]):
            assert fine.grid is not None and fine.grid[row].tolist() == [*(cell * 4 + (r, c))]
            tile = image[r * 256 : r * 256 + 256, c * 256 : c * 256 + 256]
            np.testing.assert_allclose(fine.features[row], tile.mean((0, 1)) / 255, atol=1e-4)
            row += 1
    assert row == len(fine.features)
    view = views[views.ranges[slide][0]]
    expected = fields.decode(view["image"]).mean((0, 1)) / 255
    np.testing.assert_allclose(made["mean_rgb", 8.0].features[0], expected, atol=1e-4)


def test_coordinates_stand_in_the_order_that_tiling_wrote(extracted):
    path = extracted.folders["mean_rgb", 0.5]
    for slide_id, bag in bags(path).items():
        with h5py.File(path.parent / "patches" / f"{slide_id}_patches.h5") as other:
            np.testing.assert_array_equal(bag.coords, np.asarray(other["coords"]))


def test_a_rows_features_depend_neither_on_its_place_in_the_batch_nor_on_its_neighbours(
    grid_dir: Path, extracted, tmp_path
):
    """Bit for bit: without the coarser views between them all tiles stand elsewhere in the batches."""
    one = extract_fields(grid_dir, ["hed_texture"], out=tmp_path, batch=32, mpps=[0.5], **QUIET)
    ((column, path),) = one.folders.items()
    for slide_id in bags(path):
        file = extracted.folders[column] / f"{slide_id}.h5"
        assert (path / f"{slide_id}.h5").read_bytes() == file.read_bytes()


def test_the_size_of_the_batch_changes_no_more_than_rounding(grid_dir, extracted, tmp_path):
    seven = extract_fields(grid_dir, ["hed_texture"], out=tmp_path, batch=7, **QUIET)
    for column, path in seven.folders.items():
        for slide_id, bag in bags(path).items():
            other = features.read_features(extracted.folders[column] / f"{slide_id}.h5")
            np.testing.assert_array_equal(bag.grid, other.grid)
            np.testing.assert_allclose(bag.features, other.features, rtol=1e-4, atol=1e-4)


def test_what_is_there_is_skipped_and_what_is_missing_is_all_that_is_done(grid_dir, extracted):
    store, names = FieldStore(grid_dir), ["hed_texture", "mean_rgb"]
    before = files(grid_dir)
    stamps = {p: p.stat().st_mtime_ns for p in grid_dir.rglob("features_*/*.h5")}
    again = extraction.extract(store, names, **QUIET)
    assert (again.done, again.skipped, again.speed.tiles) == (0, 4, 0)
    slide = store.slide_ids[1]
    lost = extracted.folders["mean_rgb", 2.0] / f"{slide}.h5"
    lost.unlink()
    once = extraction.extract(store, names, **QUIET)
    assert (once.done, once.skipped) == (1, 3)
    assert once.speed.tiles == store._slide(slide).fields, "one magnification"
    assert files(grid_dir) == before
    del stamps[lost]
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    (row,) = [r for r in read_csv(grid_dir / "extraction.csv") if r["slide_id"] == slide]
    assert row["encoders"] == "mean_rgb" and row["state"] == "done"


def test_another_type_or_precision_is_another_recipe(grid_dir, extracted, tmp_path):
    vit = _small_vit(tmp_path / "vit")

    def run(name, **changes) -> int:
        how = {"mpps": [8.0], "out": tmp_path, **QUIET, **changes}
        return extract_fields(grid_dir, [name], **how).done

    half = {"dtype": "float16"}
    assert [run(vit), run(vit), run(vit, **half)] == [4, 0, 4]
    assert run(vit, **half, precision="bfloat16") == 4
    # What is computed without weights has one precision; an encoder at hand keeps its own.
    assert [run("mean_rgb", **half), run("mean_rgb", **half, precision="bfloat16")] == [4, 0]
    assert run(encoder.load(vit, "bfloat16"), **half, precision="float32") == 0
    (path,) = (tmp_path / grid_dir.name).glob("1.25x*/features_mean_rgb/*0.h5")
    with h5py.File(path) as file:
        data = file["features"]
        assert isinstance(data, h5py.Dataset)
        assert data.dtype == np.float16 and data.chunks is None and data.attrs["encoder"]


def test_features_from_slides_are_those_from_fields_in_the_same_places(
    cohort, grid_dir, extracted, tmp_path
):
    vit = _small_vit(tmp_path / "vit")
    names = ["hed_texture", "mean_rgb", vit]
    own = extract_fields(grid_dir, [vit], out=tmp_path / "of fields", **QUIET)
    folders = extracted.folders | own.folders
    two = tmp_path / "slides"
    two.mkdir()
    for slide in sorted((cohort / "slides").iterdir())[:2]:
        (two / slide.name).symlink_to(slide)
    direct = extract_slides(two, tmp_path / "of slides", names, **QUIET)
    assert (direct.done, direct.errors) == (2, [])
    tmp_path /= "of slides"
    grid = tmp_path / grid_dir.name
    for name, path in direct.folders.items():
        assert path.parent.parent == grid
        for slide_id, bag in bags(path).items():
            stored = features.read_features(folders[name] / f"{slide_id}.h5")
            np.testing.assert_array_equal(bag.coords, stored.coords)
            np.testing.assert_array_equal(bag.grid, stored.grid)
            assert {**bag.attrs, "recipe": ""} == {**stored.attrs, "recipe": ""}
            # JPEG touches texture, which a learned encoder sees less of than these octave energies do.
            least = {"mean_rgb": 0.99999, "hed_texture": 0.99}.get(name[0], 0.999)
            assert cosines(bag.features, stored.features).min() > least
    for file in grid_dir.rglob("*_patches.h5"):
        again = grid / file.relative_to(grid_dir)
        if not any(again.stem.startswith(slide.stem) for slide in two.iterdir()):
            continue
        with h5py.File(file) as a, h5py.File(again) as b:
            np.testing.assert_array_equal(np.asarray(a["coords"]), np.asarray(b["coords"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        grid.name, "contours", "contours_geojson", "thumbnails",
    ]  # fmt: skip
    assert not (grid / "fields").exists() and not (grid / ".claims").exists()
    assert extract_slides(two, tmp_path, names, **QUIET).skipped == 2


def _small_vit(folder: Path) -> Path:
    """A converted encoder with random weights that let every block count."""
    definition = Definition(
        "small",
        dict(patch=16, width=48, depth=3, heads=3, layer_scale=1.0, grid=14, registers=1),
        Input(),
        positions="patches",
        licence="CC-BY-NC-ND-4.0",
        source="here",
        terms="ask first",
    )
    rng = np.random.default_rng(0)
    shapes = patch.abstract(definition)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    encoder.save(folder, definition, params, made_from=[])
    return folder


def test_the_licence_of_an_encoder_goes_with_its_features(grid_dir, tmp_path):
    done = extract_fields(
        grid_dir, [_small_vit(tmp_path / "vit")], out=tmp_path, mpps=[2.0], **QUIET
    )
    for folder in done.folders.values():
        with h5py.File(next(folder.glob("*.h5"))) as file:
            told = json.loads(file["features"].attrs["made_from"])
            assert "made_from" not in file["coords"].attrs
        assert [(x["licence"], x["terms"]) for x in told] == [("CC-BY-NC-ND-4.0", "ask first")]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_processes_read_what_threads_read(slides, tmp_path):
    for workers, out in ((0, tmp_path / "threads"), (2, tmp_path / "processes")):
        how = {**QUIET, **SMALL, "workers": workers, "batch": 100}
        assert extract_slides(slides, out, ["mean_rgb"], **how).done == 2
    assert files(tmp_path / "threads") == files(tmp_path / "processes")


def test_batches_are_spread_over_all_devices(slides, tmp_path):
    """Four of them, to which 30 tiles are rounded up: the same features."""
    command = [sys.executable, "-m", "pathme_jax.extract", "--encoder", "mean_rgb", "--tile-px"]
    command += ["32", "--slides", str(slides), "--batch", "30", "--dtype", "float32"]
    command += ["--workers", "0", "--out"]
    for devices in (1, 4):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        env = {**os.environ, "XLA_FLAGS": flags}
        done = subprocess.run(
            [*command, str(tmp_path / str(devices))], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-500:]
    assert files(tmp_path / "1") == files(tmp_path / "4")


def test_a_slide_smaller_than_a_region_has_an_empty_file_of_the_right_width(
    paint, write_tiff, tmp_path
):
    write_tiff(tmp_path / "s" / "small.tiff", paint()[:, :500])
    how = {**QUIET, **SMALL}
    only = extract_slides(tmp_path / "s", tmp_path / "o", ["mean_rgb"], **how | {"mpps": [0.5, 8]})
    assert only.done == 1 and not only.errors
    assert features.read_features(only.folders["mean_rgb", 8] / "small.h5").features.shape == (0, 3)


def test_every_bad_slide_is_listed_with_its_cure_and_stops_no_other(paint, write_tiff, tmp_path):
    folder = tmp_path / "s"
    good = write_tiff(folder / "good.tiff", paint(), compression="jpeg")
    data = bytearray(good.read_bytes())
    start = len(data) // 8
    data[start : start + 4000] = b"\xff" * 4000  # tiles in the middle of level 0
    (folder / "damaged.tiff").write_bytes(data)
    (folder / "unreadable.tiff").write_bytes(b"II*\0nothing")
    write_tiff(folder / "nompp.tiff", paint(), mpp=None)
    write_tiff(folder / "coarse.tiff", paint(), mpp=4.0)
    write_tiff(folder / "blank.tiff", np.full((1100, 1100, 3), 243, np.uint8))
    done = extract_slides(folder, tmp_path / "o", ["mean_rgb"], **QUIET, **SMALL)
    reasons = {e["slide_id"]: f"{e['reason']} {e['cure']}" for e in done.errors}
    assert set(reasons) == {"damaged", "unreadable", "nompp", "coarse", "blank"}
    assert done.done == 1 and "5 failed" in str(done) and "--mpp-csv" in str(done)
    for slide_id, part in (
        ("damaged", "cannot be read"),
        ("unreadable", "cannot be read"),
        ("nompp", "--mpp-csv"),
        ("coarse", "too coarse"),
        ("blank", "no tissue"),
    ):
        assert part in reasons[slide_id]
    root = next((tmp_path / "o").glob("20x-*"))
    assert {path.name for path in root.rglob("features_*/*")} == {"good.h5"}, "no temporary files"
    table = {row["slide_id"]: row for row in read_csv(root / "extraction.csv")}
    assert table["good"]["state"] == "done" and float(table["good"]["seconds"]) > 0
    assert table["blank"]["state"] == "failed" and table["blank"]["reason"] == "no tissue found"
    assert {row["slide_id"] for row in read_csv(root / "extraction_errors.csv")} == set(reasons)


def test_a_damaged_shard_costs_its_slide(grid_dir, tmp_path):
    copy = tmp_path / grid_dir.name
    subprocess.run(["cp", "-r", str(grid_dir), str(copy)], check=True)
    for folder in copy.glob("*overlap"):
        subprocess.run(["rm", "-r", *map(str, folder.glob("features_*"))], check=False)
    first, second, *_ = fields.tiled_slides(copy)
    shard = copy / "fields" / f"{first}.array_record"
    shard.write_bytes(shard.read_bytes()[:1000])
    shard = copy / "fields" / f"{second}.array_record"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50_000] = bytes(50_000)
    shard.write_bytes(data)
    done = extract_fields(copy, ["mean_rgb"], **QUIET)
    assert done.done == 2 and [e["slide_id"] for e in done.errors] == [first, second]
    assert all("data_prep.tile" in error["cure"] for error in done.errors)


@pytest.fixture
def brightness(monkeypatch):
    """An encoder of 1e5 times the mean colour, NaN where that is dark."""

    def encode(images):
        mean = descriptors.mean_rgb(images)
        return jnp.where(mean < 0.2, jnp.nan, 1e5 * mean)

    monkeypatch.setitem(encoder.FIXED, "brightness", encode)
    return "brightness"


def test_features_that_cannot_be_stored_cost_their_slide(slides, write_tiff, brightness, tmp_path):
    dark = np.full((1100, 1100, 3), (110, 20, 80), np.uint8)
    dark[:200] = 243
    write_tiff(slides / "dark.tiff", dark)
    how = {**QUIET, **SMALL}
    with pytest.raises(
        UserError, match=r"none of the 3 .*exceed the largest float16.*--dtype float32"
    ):
        extract_slides(slides, tmp_path / "o", [brightness], **{**how, "dtype": "float16"})
    full = extract_slides(slides, tmp_path / "o", [brightness], **how)
    assert full.done == 2 and [e["slide_id"] for e in full.errors] == ["dark"]
    assert "not finite" in full.errors[0]["reason"]
    assert {p.name for p in (tmp_path / "o").rglob("features_*/*")} == {"a.h5", "b.h5"}


def test_mpp_is_the_finest_or_4_or_16_times_it(grid_dir):
    assert parse_mpps("8,0.5") == [0.5, 8.0]
    assert multiples_of([0.5, 8.0], 0.5, (1, 4, 16)) == [1, 16]
    assert multiples_of([1.0], 0.25, (1, 4)) == [4]
    for wrong in ("0,1", "x", "-1"):
        with pytest.raises(UserError, match="--mpp"):
            parse_mpps(wrong)
    with pytest.raises(UserError, match=r"--mpp 1 cannot be had here.* give 0\.5, 2, 8"):
        extract_fields(grid_dir, ["mean_rgb"], mpps=[1.0])
    with pytest.raises(UserError, match="--dtype int8"):
        extract_fields(grid_dir, ["mean_rgb"], dtype="int8")


def test_a_dry_run_says_what_there_is_to_do_and_writes_nothing(grid_dir, cohort, slides, tmp_path):
    before = sorted(grid_dir.rglob("*"))
    said = describe(FieldStore(grid_dir), ["mean_rgb"], mpps=[0.5, 8.0], out=tmp_path)
    tiles = sum(FieldStore(grid_dir)._slide(s).tiles for s in fields.tiled_slides(grid_dir))
    assert "4 slides, 0 of them done" in said and f"0.5 µm/px: {tiles} tiles to encode" in said
    assert "8 µm/px: 4 tiles" in said and "GB to be written, features as float16" in said
    assert sorted(grid_dir.rglob("*")) == before and not any(tmp_path.glob("20x-*"))
    store = slide_store(slides, tmp_path / "o", SMALL["mpps"], SMALL["tile_px"])
    assert "2 slides need whose tissue" in describe(store, ["mean_rgb"])
    assert not (tmp_path / "o").exists()
    extraction.extract(store, ["mean_rgb"], **QUIET)
    assert "2 slides, 2 of them done" in describe(store, ["mean_rgb"], dtype="float32")


def test_tiles_unlike_those_an_encoder_was_trained_on_are_warned_of(
    grid_dir, monkeypatch, capsys, tmp_path
):
    public = zoo.Definition(
        "known", {"width": 3}, zoo.Input(), "patches", "MIT", "here", mpp=(1.0,)
    )
    plain = encoder.load("mean_rgb")
    known = encoder.dataclasses.replace(plain, definition=public)
    monkeypatch.setattr(extraction, "load", lambda name, precision: known)
    extract_fields(grid_dir, ["known"], mpps=[0.5], out=tmp_path, workers=0)
    said = capsys.readouterr().out
    assert "trained at 1 µm/px, none of 0.5 is that" in said
    assert "256 px look to it like 0.5714 µm/px; --tile-px 224 does not" in said
    assert "known" not in describe(FieldStore(grid_dir), ["known"]).split("MIT")[0].split("\n")[0]


def test_too_large_a_batch_is_told_as_such(grid_dir, monkeypatch, tmp_path):
    def full(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    made = Devices.__init__

    def init(self, *arguments):
        made(self, *arguments)
        self._apply = dict.fromkeys(self._apply, full)

    monkeypatch.setattr(Devices, "__init__", init)
    with pytest.raises(UserError, match=r"no memory for batches of 32 tiles.*--batch 16"):
        extract_fields(grid_dir, ["mean_rgb"], out=tmp_path, **QUIET)
    assert not list(tmp_path.rglob("*.h5")) and not list(tmp_path.rglob(".claims"))


def test_a_full_disk_ends_the_run_with_one_line_and_a_rerun_finishes(
    slides, tmp_path, monkeypatch, capsys
):
    command = ["--encoder", "mean_rgb", "--slides", str(slides), "--out", str(tmp_path / "o")]
    command += ["--tile-px", "32", "--workers", "0"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(features.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
        main(command)
    assert end.value.code == 2
    assert "no space left writing" in capsys.readouterr().err
    assert not list((tmp_path / "o").rglob("features_*/*"))
    assert not list((tmp_path / "o").rglob(".claims"))
    main(command)
    assert "2 slides encoded, 0 were done, 0 failed" in capsys.readouterr().out


def test_patches_of_a_folder_keep_their_names(tmp_path):
    colours = {"TUM/a.png": 200, "TUM/b.png": 100, "NORM/c.png": 50}
    for name, grey in colours.items():
        path = tmp_path / "patches" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((64, 64, 3), grey, np.uint8))
    grid = images.run(tmp_path / "patches", tmp_path / "o", mpp=0.5, progress=False).grid_dir
    done = extract_fields(grid, ["mean_rgb"], **QUIET)
    assert list(done.folders) == [("mean_rgb", 0.5)]
    found = {}
    for path in done.folders["mean_rgb", 0.5].glob("*.h5"):
        with h5py.File(path) as file:
            names = [name.decode() for name in np.asarray(file["name"])]
            found |= dict(zip(names, np.asarray(file["features"])[:, 0], strict=True))
    assert found == pytest.approx({name: grey / 255 for name, grey in colours.items()}, abs=0.01)
    with pytest.raises(UserError, match="--mpp 2 cannot be had here"):
        extract_fields(grid, ["mean_rgb"], mpps=[2.0])


def test_an_unknown_encoder_or_one_of_regions_is_named(grid_dir: Path):
    with pytest.raises(UserError, match="no encoder 'absent'"):
        extract_fields(grid_dir, ["absent"])


def test_texture_descriptors_ignore_quarter_turns_and_have_the_width_they_say():
    image = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)
    turned = np.rot90(image, 1, (1, 2)).copy()
    a, b = descriptors.hed_texture(image), descriptors.hed_texture(turned)
    assert a.shape == (2, 26)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
