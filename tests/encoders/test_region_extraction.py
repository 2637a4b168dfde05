"""Regions: tokens of the trained weights, where they belong."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from configs import pathme_tiny
from pathme_jax.encoders.encoder import load
from pathme_jax.encoders.extraction import extract_fields
from pathme_jax.encoders.region_extraction import describe, extract_regions
from pathme_jax.errors import UserError
from pathme_jax.extract import main
from pathme_jax.files import read_json
from pathme_jax.records import features
from pathme_jax.records.join import join
from pathme_jax.records.regions import RegionSource
from pathme_jax.training.loop import train
from pathme_jax.training.step import params_of

QUIET = {"progress": False, "dtype": "float32"}


@pytest.fixture(scope="module")
def extracted(grid_dir: Path):
    return extract_fields(grid_dir, ["hed_texture", "mean_rgb"], workers=0, **QUIET)


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
    out = extract_regions(regions.folder, trained, **QUIET)
    (path,) = out.folders.values()
    source = RegionSource(regions.folder, load(trained).columns)
    from pathme_jax.training.contract import load_method

    method = load_method(config)
    batch = {k: np.stack([source[i][k] for i in range(4)]) for k in source[0]}

    encode = jax.jit(method.encode)

    def tokens(params) -> np.ndarray:
        got = encode({k: params[k] for k in ("encoder", "hmsa")}, batch)
        return np.concatenate(np.asarray(got["features"])[np.asarray(got["valid"])][None])

    bags = [features.read_features(f) for f in sorted(path.glob("*.h5"))]
    stored = np.concatenate([bag.features for bag in bags])
    params = params_of(kept["state"])
    np.testing.assert_allclose(stored, tokens(params["teacher"]), rtol=1e-4, atol=1e-4)
    assert np.abs(stored - tokens(params["student"])).max() > 1e-3
    shapes = jax.eval_shape(lambda: batch)
    random, _ = jax.jit(lambda key: method.init(key, shapes))(jax.random.key(config.seed))
    assert np.abs(stored - tokens(random["teacher"])).max() > 1e-3
    # spatial tokens stand on 5x tiles, prompts on their region's corner
    spatial = bags[0].kind == features.SPATIAL
    assert bags[0].grid is not None and (bags[0].coords[~spatial] == 0).all()
    np.testing.assert_array_equal(bags[0].coords[spatial], bags[0].grid[spatial][:, ::-1] * 1024)
    assert extract_regions(regions.folder, trained, **QUIET).done == 0


def test_a_patch_encoder_is_refused_for_regions_and_the_other_way_round(grid_dir: Path, extracted):
    regions = join(grid_dir, [("mean_rgb", 1)], progress=False).folder
    with pytest.raises(UserError, match="encodes images"):
        extract_regions(regions, "mean_rgb")
    assert read_json(regions / "recipe.json")["columns"][0]["width"] == 3
    assert describe(regions, "mean_rgb") == "mean_rgb: 4 regions of 4 slides"


def test_a_folder_without_regions_is_told(grid_dir: Path, tmp_path):
    for wrong in (tmp_path / "nowhere", grid_dir):
        with pytest.raises(UserError, match="no regions here"):
            describe(wrong, "mean_rgb")
    with pytest.raises(SystemExit) as end:
        main(["--encoder", "mean_rgb", "--regions", str(tmp_path / "nowhere"), "--dry-run"])
    assert end.value.code == 2
