"""Folders of patches as fields: which pixels, whose names, and what becomes of bad images."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from data_prep.tile import main
from pathme_jax.data.pipeline import batches
from pathme_jax.errors import UserError
from pathme_jax.files import read_json
from pathme_jax.records import fields
from pathme_jax.slides import images
from pathme_jax.training.contract import BatchSpec
from pathme_jax.training.probe import Probe


def picture(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    """(height, width, 3) in smooth colours, which JPEG changes little."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(60, 200, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    return blocks.repeat(16, 0).repeat(16, 1)[:height, :width]


def put(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """Classes TUM (a JPEG, a PNG) and NORM (a TIFF), all of 64 px."""
    root = tmp_path / "patches"
    put(root / "TUM" / "a.jpg", picture(0), quality=70)
    put(root / "TUM" / "b.png", picture(1))
    put(root / "NORM" / "c.tif", picture(2))
    return root


def store(root: Path, out: Path, **options) -> images.Stored:
    return images.run(root, out, mpp=0.5, progress=False, **options)


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_each_image_is_a_field_of_one_tile_and_keeps_its_name(tmp_path, patches):
    stored = store(patches, tmp_path / "out")
    source = fields.FieldSource(stored.grid_dir)
    assert source.slide_ids == ["NORM", "TUM"] and len(source) == 3
    names = [name for s in source.slide_ids for name in source.sidecars[s]["names"]]
    assert names == ["NORM/c.tif", "TUM/a.jpg", "TUM/b.png"]
    for index, (seed, cell) in enumerate([(2, [0, 0]), (0, [0, 0]), (1, [1, 0])]):
        record = source[index]
        shown = fields.decode(record["image"]).astype(int)
        assert np.abs(shown - picture(seed)).mean() < 4
        assert record["tissue"].tolist() == [[True]] and record["grid"].tolist() == cell
        assert record["level0_xy"].tolist() == [64 * cell[1], 64 * cell[0]]
        assert record["mpp"] == record["slide_mpp"] == 0.5
    recipe = read_json(stored.grid_dir / "recipe.json")
    assert recipe["tile_px"] == recipe["field_px"] == 64 and stored.grid_dir.name.startswith("20x-")
    assert len(fields.ViewSource(stored.grid_dir)) == 0


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_of_the_right_size_is_stored_byte_for_byte(tmp_path, mode):
    pixels = picture(0) if mode == "RGB" else picture(0)[..., 0]
    path = put(tmp_path / "p" / "a.jpg", pixels, quality=60)
    source = fields.FieldSource(store(tmp_path / "p", tmp_path / "out").grid_dir)
    assert source[0]["image"] == path.read_bytes()
    assert fields.decode(source[0]["image"]).shape == (64, 64, 3)


def test_labels_are_the_sub_folders_names(tmp_path, patches):
    put(patches / "loose.png", picture(3))
    put(patches / "deep" / "TUM" / "d.png", picture(4))
    stored = store(patches, tmp_path / "out")
    assert table(stored.grid_dir / "labels.csv") == [
        {"image": "NORM/c.tif", "slide_id": "NORM", "label": "NORM"},
        {"image": "TUM/a.jpg", "slide_id": "TUM", "label": "TUM"},
        {"image": "TUM/b.png", "slide_id": "TUM", "label": "TUM"},
        {"image": "deep/TUM/d.png", "slide_id": "deep__TUM", "label": "TUM"},
    ]
    assert fields.tiled_slides(stored.grid_dir) == ["NORM", "TUM", "deep__TUM", "patches"]


def test_a_larger_image_is_cut_around_its_centre(tmp_path):
    pixels = picture(0, 100, 170)
    put(tmp_path / "p" / "a.png", pixels)
    put(tmp_path / "p" / "b.png", picture(1, 32, 40))
    stored = store(tmp_path / "p", tmp_path / "out", tile_px=32)
    source = fields.FieldSource(stored.grid_dir)
    assert source.sidecars["p"]["names"] == ["a.png"] * 15 + ["b.png"]
    top, left = 2, 5
    for index in range(15):
        row, column = divmod(index, 5)
        assert source[index]["grid"].tolist() == [row, column]
        y, x = top + 32 * row, left + 32 * column
        shown = fields.decode(source[index]["image"]).astype(int)
        assert np.abs(shown - pixels[y : y + 32, x : x + 32]).mean() < 4
    assert source[15]["grid"].tolist() == [3, 0], "images lie below each other"
    assert len({tuple(source[i]["level0_xy"]) for i in range(16)}) == 16


@pytest.mark.parametrize(
    ("sizes", "side"),
    [([(96, 96)] * 3 + [(40, 40)], 96), ([(1100, 1100)] * 2, 256), ([(460, 700)] * 2, 256)],
)
def test_images_stay_whole_where_most_have_one_square_size_that_a_field_may_have(
    tmp_path, sizes, side
):
    for i, size in enumerate(sizes):
        put(tmp_path / "p" / f"{i}.png", picture(i, *size))
    stored = store(tmp_path / "p", tmp_path / "out")
    assert read_json(stored.grid_dir / "recipe.json")["tile_px"] == side


def bad_images(root: Path) -> None:
    whole = (root / "TUM" / "a.jpg").read_bytes()
    (root / "TUM" / "cut.jpg").write_bytes(whole[:-100])  # its header tells of nothing
    (root / "TUM" / "text.png").write_text("not a picture")
    put(root / "TUM" / "small.png", picture(3, 20, 64))
    put(root / "TUM" / "deep.png", np.zeros((64, 64), np.uint16))


def test_a_bad_image_is_listed_with_its_cure_and_costs_itself_alone(tmp_path, patches):
    bad_images(patches)
    for _ in range(2):  # what was found stands when nothing is left to do
        stored = store(patches, tmp_path / "out")
        errors = {row["image"]: row for row in table(stored.grid_dir / "errors.csv")}
        for name, reason, cure in (
            ("TUM/cut.jpg", "cannot be read", "Copy it again"),
            ("TUM/deep.png", "I;16", "8 bits"),
            ("TUM/small.png", "64 × 20 px, smaller than a tile of 64 px", "--tile-px"),
            ("TUM/text.png", "cannot be read", "Copy it again"),
        ):
            row = errors.pop(name)
            assert reason in row["reason"] and cure in row["cure"] and row["slide_id"] == "TUM"
            assert name in str(stored)
        assert not errors
        source = fields.FieldSource(stored.grid_dir)
        assert source.sidecars["TUM"]["names"] == ["TUM/a.jpg", "TUM/b.png"]


def test_an_image_that_is_gone_costs_itself_alone(tmp_path, patches, monkeypatch):
    """A link that leads nowhere, and an image deleted after it was found."""
    (patches / "TUM" / "link.png").symlink_to(tmp_path / "nowhere.png")
    deleted = put(patches / "NORM" / "d.png", picture(3))
    find = images.find_images

    def find_and_delete(root):
        found = find(root)
        deleted.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(images, "find_images", find_and_delete)
    stored = store(patches, tmp_path / "out")
    assert [error["image"] for error in stored.errors] == ["NORM/d.png", "TUM/link.png"]
    assert all("No such file" in error["reason"] for error in stored.errors)
    assert len(fields.FieldSource(stored.grid_dir)) == 3
    put(tmp_path / "nowhere.png", picture(4))
    assert not store(patches, tmp_path / "out").errors


@pytest.mark.parametrize("back", [".", "..", "../.."])
def test_links_are_followed_but_not_in_circles(tmp_path, patches, back):
    (patches / "also").symlink_to(patches / "TUM")
    (patches / "NORM" / "back").symlink_to(back)
    found = [folder.slide_id for folder in images.find_images(patches)]
    assert found == ["NORM", "TUM", "also"]


def test_a_folder_of_bad_images_leaves_nothing_of_its_earlier_self(tmp_path, patches):
    grid_dir = store(patches, tmp_path / "out").grid_dir
    (patches / "NORM" / "c.tif").write_text("gone bad")
    stored = store(patches, tmp_path / "out", tile_px=64)
    assert [row["state"] for row in stored.folders] == ["failed", "done"]
    assert not list((grid_dir / "fields").glob("NORM*"))
    for path in (patches / "TUM").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"none of the 1 images.*NORM/c\.tif.*errors\.csv"):
        store(patches, tmp_path / "out", tile_px=64)


def test_a_rerun_does_only_what_changed(tmp_path, patches):
    def written() -> dict[str, int]:
        folder = store(patches, tmp_path / "out").grid_dir / "fields"
        return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.json")}

    first = written()
    assert written() == first
    put(patches / "NORM" / "new.png", picture(5))
    second = written()
    assert second["TUM"] == first["TUM"] and second["NORM"] != first["NORM"]
    size = (patches / "NORM" / "c.tif").stat().st_size
    assert put(patches / "NORM" / "c.tif", picture(6)).stat().st_size == size
    assert written()["NORM"] != second["NORM"]
    (shard,) = (tmp_path / "out").glob("*/fields/TUM.array_record")
    os.truncate(shard, 10)
    assert written()["TUM"] != first["TUM"]


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:32, :, 3] = 255
    put(tmp_path / "p" / "a.png", pixels)
    source = fields.FieldSource(store(tmp_path / "p", tmp_path / "out").grid_dir)
    shown = fields.decode(source[0]["image"])
    assert shown[:30].max() < 10 and shown[34:].min() > 245


def test_training_reads_windows_of_patches_and_refuses_larger_ones(tmp_path, patches):
    grid_dir = store(patches, tmp_path / "out").grid_dir

    def first(px: int, mpps: tuple[float, ...]):
        spec = BatchSpec("fields", 6, px, mpps, 2)
        return next(batches(grid_dir, spec, seed=0, threads=1))

    assert first(48, (0.5,))["window"].shape == (6, 48, 48, 3)
    assert set(first(32, (0.5, 1.0))["mpp"].tolist()) <= {0.5, 1.0}
    with pytest.raises(
        UserError, match=r"window of 96 px .* larger than a field \(64 px at 0\.5\)"
    ):
        first(96, (0.5,))


def test_the_probe_reads_whole_patches(tmp_path, patches):
    grid_dir = store(patches, tmp_path / "out").grid_dir
    (tmp_path / "labels.csv").write_text("case_id,slide_id,kind\nx,TUM,tumour\ny,NORM,normal\n")
    settings = ConfigDict(
        {
            **{"path": str(grid_dir), "labels": str(tmp_path / "labels.csv"), "column": "kind"},
            **{"tiles": 2, "px": 64, "multiple": 1, "split": "tile", "folds": 2},
        }
    )
    probe = Probe(settings)
    assert probe.labels.tolist() == ["normal", "tumour", "tumour"]
    assert probe.images.shape == (3, 64, 64, 3)


def test_tfds_reads_them(tmp_path, patches):
    import tensorflow_datasets as tfds

    grid_dir = store(patches, tmp_path / "out").grid_dir
    builder = tfds.builder_from_directory(grid_dir / "tfds" / "pathme_fields" / "1.0.0")
    data = builder.as_data_source(split="train")
    assert len(data) == 3 and data[0]["tissue"].shape == (1, 1)


def run_main(*arguments: object) -> None:
    main([str(a) for a in arguments])


def test_the_launcher_tells_dry_stores_and_refuses_what_is_of_slides(tmp_path, patches, capsys):
    given = ("--images", patches, "--out", tmp_path / "out", "--mpp", 0.5, "--workers", 1)
    run_main(*given, "--dry-run")
    told = capsys.readouterr().out
    assert "tiles of 64 px at 0.5 µm/px" in told and "TUM  to do  2 images" in told
    assert not (tmp_path / "out").exists()
    run_main(*given)
    assert "3 tiles of images in 2 folders, 0 images left out" in capsys.readouterr().out
    for wrong, message in (
        ((*given, "--min-tissue", 0.5), "--min-tissue: of slides"),
        (given[:4], "--images without --mpp"),
        (("--images", tmp_path / "out", *given[2:]), "no image in it"),
    ):
        with pytest.raises(SystemExit) as end:
            run_main(*wrong)
        assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("bad", [{"mpp": 0.0}, {"tile_px": 0}, {"tile_px": 2048}])
def test_wrong_arguments_are_named(tmp_path, patches, bad):
    with pytest.raises(UserError, match=next(iter(bad)).replace("_", "-")):
        images.run(patches, tmp_path / "out", **{"mpp": 0.5, **bad})


def test_two_folders_of_one_name_are_refused(tmp_path, patches):
    put(patches / "a" / "b" / "x.png", picture(0))
    put(patches / "a__b" / "x.png", picture(0))
    with pytest.raises(UserError, match="both be 'a__b'"):
        images.find_images(patches)
