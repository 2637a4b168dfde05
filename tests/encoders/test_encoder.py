"""Loading encoders: whole, named by what decides their features, damaged ones refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pathme_jax import encoders
from pathme_jax.encoders import encoder, patch
from pathme_jax.encoders.zoo import Definition, Input
from pathme_jax.errors import UserError
from pathme_jax.files import read_json, write_json

SMALL = Definition(
    "small",
    dict(patch=8, width=16, depth=2, heads=2, layer_scale=1.0, grid=4, registers=0),
    Input(resize=32, crop=32),
    positions="patches",
    licence="Apache-2.0",
    source="here",
    mpp=(0.5, 1.0),
)
ROW = {"name": "small", "licence": "Apache-2.0", "terms": "", "source": "here", "sha256": "0"}


def _params(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), patch.abstract(SMALL)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    encoder.save(tmp_path / "small", SMALL, _params(0), made_from=[ROW])
    return tmp_path / "small"


def test_what_was_saved_is_loaded_in_three_lines(folder: Path):
    images = np.random.default_rng(2).integers(0, 256, (3, 48, 48, 3)).astype(np.uint8)
    loaded = encoders.load(folder)
    features = loaded(images)
    np.testing.assert_allclose(features, patch.encode(SMALL, _params(0), images), rtol=1e-5)
    assert loaded.definition == SMALL
    assert loaded.made_from == [ROW]
    assert loaded.record == "fields"


def test_other_weights_input_or_output_are_another_name_other_words_are_not(tmp_path: Path):
    def name(definition: Definition, seed: int = 0) -> str:
        return encoder.save(tmp_path / "e", definition, _params(seed), made_from=[])

    first = name(SMALL)
    assert first.startswith("small-") and len(first) == len("small-1a2b3c4d")
    assert name(dataclasses.replace(SMALL, licence="MIT", mpp=(2.0,))) == first
    others = [
        name(SMALL, seed=1),
        name(dataclasses.replace(SMALL, output="cls+mean")),
        name(dataclasses.replace(SMALL, input=Input(resize=64, crop=32))),
        name(dataclasses.replace(SMALL, model={**SMALL.model, "resample": "bicubic"})),
    ]
    assert len({first, *others}) == 5


@pytest.mark.parametrize("damage", ["truncated", "other numbers", "no such field", "no file"])
def test_a_damaged_folder_is_refused(folder: Path, damage):
    weights = folder / "params.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "other numbers":
        arrays = load_file(weights)
        save_file({k: v + 1 for k, v in arrays.items()}, weights)
    elif damage == "no such field":
        about = read_json(folder / "encoder.json")
        about["definition"]["colour"] = "blue"
        write_json(folder / "encoder.json", about)
    else:
        weights.unlink()
    with pytest.raises(UserError, match="Convert or export it again") as error:
        encoders.load(folder)
    assert str(folder) in str(error.value)


def test_a_known_encoder_without_weights_says_how_to_get_them(tmp_path: Path):
    with pytest.raises(UserError, match=r"MahmoodLab/UNI, then: python -m pathme_jax\.convert"):
        encoders.load("uni")
    with pytest.raises(UserError, match="no encoder 'uno'"):
        encoders.load("uno")
    with pytest.raises(UserError, match="no finished training run here"):
        encoders.load(tmp_path)
