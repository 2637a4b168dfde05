"""Extraction: the right pixels, the trained weights, and nothing done twice."""

from __future__ import annotations

from pathlib import Path

import h5py
import jax
import numpy as np
import pytest

from configs import pathme_tiny
from pathme_jax.encoders import descriptors
from pathme_jax.encoders.extraction import (
    describe,
    extract_fields,
    extract_regions,
    folder,
    level0,
    parse_multiples,
)
from pathme_jax.encoders.load import load
from pathme_jax.errors import UserError
from pathme_jax.files import read_json
from pathme_jax.records import features, fields
from pathme_jax.records.join import join
from pathme_jax.records.regions import RegionSource
from pathme_jax.training.loop import train
from pathme_jax.training.step import params_of


@pytest.fixture(scope="module")
def extracted(grid_dir: Path):
    return extract_fields(grid_dir, ["hed_texture", "mean_rgb"], batch=32, progress=False)


def test_features_are_those_of_the_tiles_pixels(grid_dir: Path, extracted):
    """Mean colours recomputed from the stored fields, at all three magnifications."""
    source, views = fields.FieldSource(grid_dir), fields.ViewSource(grid_dir)
    slide = source.slide_ids[0]
    bags = {k: features.read_features(p / f"{slide}.h5") for k, p in extracted.folders.items()}
    record = source[source.ranges[slide][1]]
    image, (row, column) = fields.decode(record["image"]), record["grid"]
    coarse = bags["mean_rgb", 2.0]
    at = np.flatnonzero((coarse.grid == [row, column]).all(1)).item()
    np.testing.assert_allclose(coarse.features[at], image.mean((0, 1)) / 255, atol=2e-3)
    fine = bags["mean_rgb", 0.5]
    assert len(fine.features) == sum(source[i]["tissue"].sum() for i in source.ranges[slide])
    for r, c in np.argwhere(record["tissue"]):
        at = np.flatnonzero((fine.grid == [row * 4 + r, column * 4 + c]).all(1)).item()
        tile = image[r * 256 : r * 256 + 256, c * 256 : c * 256 + 256]
        np.testing.assert_allclose(fine.features[at], tile.mean((0, 1)) / 255, atol=1e-4)
    np.testing.assert_array_equal(fine.coords, fine.grid[:, ::-1] * 256)  # 0.5 µm/px: exact
    view = views[views.ranges[slide][0]]
    expected = fields.decode(view["image"]).mean((0, 1)) / 255
    np.testing.assert_allclose(bags["mean_rgb", 8.0].features[0], expected, atol=1e-4)


def test_coordinates_are_those_that_tiling_wrote(grid_dir: Path, extracted):
    """TRIDENT's reader joins patches/ and features_/ by row content: the same set of corners."""
    path = extracted.folders["mean_rgb", 0.5]
    for file in sorted(path.glob("*.h5")):
        with h5py.File(path.parent / "patches" / f"{file.stem}_patches.h5") as other:
            corners = set(map(tuple, np.asarray(other["coords"]).tolist()))
        assert corners == set(map(tuple, features.read_features(file).coords.tolist()))


def test_the_batch_size_changes_nothing_and_a_rerun_does_nothing(grid_dir: Path, extracted):
    path = extracted.folders["hed_texture", 0.5]
    before = {
        f.name: (f.stat().st_mtime_ns, features.read_features(f).features) for f in path.glob("*")
    }
    again = extract_fields(grid_dir, ["hed_texture", "mean_rgb"], progress=False)
    assert (again.done, again.skipped) == (0, 4)
    for file in path.glob("*.h5"):
        assert file.stat().st_mtime_ns == before[file.name][0]
        file.unlink()
    one = extract_fields(grid_dir, ["hed_texture"], multiples=[1], batch=7, progress=False)
    assert one.done == 4
    for file in path.glob("*.h5"):
        np.testing.assert_allclose(
            features.read_features(file).features, before[file.name][1], rtol=1e-4, atol=1e-4
        )


def test_an_unknown_encoder_or_magnification_is_named(grid_dir: Path):
    with pytest.raises(UserError, match="no encoder 'uni'"):
        load("uni")
    with pytest.raises(UserError, match="multiples"):
        parse_multiples("1,3")
    assert parse_multiples("1,16") == [1, 16]
    assert "4 slides" in describe(grid_dir, ["mean_rgb"])


def test_level0_coordinates_do_not_drift():
    """Tile 100 of 128 µm at 0.5044 µm/px begins at round(25376.68), not at 100 x round(253.77)."""
    assert level0(np.array([[0, 100]]), 128.0, 0.5044).tolist() == [[25377, 0]]


def test_region_tokens_come_from_the_ema_teacher_of_the_checkpoint(
    grid_dir: Path, extracted, tmp_path, monkeypatch
):
    """Not from random weights (upstream never loaded its own), and not from the student."""
    regions = join(grid_dir, [("mean_rgb", 1), ("mean_rgb", 4), ("hed_texture", 1)], progress=False)
    config = pathme_tiny.get_config("test")
    config.columns = dict(
        fine="mean_rgb@20x", coarse="mean_rgb@5x", experts={"hed": "hed_texture@20x"}
    )
    config.data.path = str(regions.folder)
    kept = {}

    def keep(state):
        kept["state"] = jax.tree.map(np.asarray, state)
        return params_of(state)

    monkeypatch.setattr("pathme_jax.training.loop.params_of", keep)
    trained = train(config, tmp_path / "region", progress=False)
    out = extract_regions(regions.folder, trained, progress=False)
    (path,) = out.folders.values()
    source = RegionSource(regions.folder, load(trained).columns)
    from pathme_jax.training.contract import load_method

    method = load_method(config)
    batch = {k: np.stack([source[i][k] for i in range(4)]) for k in source[0]}

    def tokens(part: str) -> np.ndarray:
        params = params_of(kept["state"])
        got = method.encode({k: params[part][k] for k in ("encoder", "hmsa")}, batch)
        return np.concatenate(np.asarray(got["features"])[np.asarray(got["valid"])][None])

    bags = [features.read_features(f) for f in sorted(path.glob("*.h5"))]
    stored = np.concatenate([bag.features for bag in bags])
    np.testing.assert_allclose(stored, tokens("teacher"), rtol=1e-4, atol=1e-4)
    assert np.abs(stored - tokens("student")).max() > 1e-3
    config.steps = 0
    untrained = extract_regions(
        regions.folder, train(config, tmp_path / "random", progress=False), progress=False
    )
    (other,) = untrained.folders.values()
    assert other != path
    first = sorted(path.glob("*.h5"))[0]
    assert (
        np.abs(features.read_features(other / first.name).features - bags[0].features).max() > 1e-3
    )
    # spatial tokens stand on 5x tiles, prompts on their region's corner
    spatial = bags[0].kind == features.SPATIAL
    assert bags[0].grid is not None and (bags[0].coords[~spatial] == 0).all()
    np.testing.assert_array_equal(bags[0].coords[spatial], bags[0].grid[spatial][:, ::-1] * 1024)
    assert extract_regions(regions.folder, trained, progress=False).done == 0


def test_a_patch_encoder_is_refused_for_regions_and_the_other_way_round(grid_dir: Path, extracted):
    folder_20x = folder(grid_dir, "mean_rgb", 0.5)
    assert folder_20x == extracted.folders["mean_rgb", 0.5]
    regions = join(grid_dir, [("mean_rgb", 1)], progress=False).folder
    with pytest.raises(UserError, match="encodes images"):
        extract_regions(regions, "mean_rgb")
    assert read_json(regions / "recipe.json")["columns"][0]["width"] == 3


def test_texture_descriptors_ignore_quarter_turns_and_have_the_width_they_say():
    image = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8)
    turned = np.rot90(image, 1, (1, 2)).copy()
    a, b = descriptors.hed_texture(image), descriptors.hed_texture(turned)
    assert a.shape == (2, 26)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
