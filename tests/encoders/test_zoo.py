"""The table of public encoders: complete, of the published sizes, and printed."""

from __future__ import annotations

import json

import jax
import pytest

from pathme_jax.encoders import __main__ as launcher
from pathme_jax.encoders import patch, zoo
from pathme_jax.models.resample import RULES


@pytest.mark.parametrize("name", zoo.ENCODERS)
def test_it_has_the_published_number_of_parameters(name):
    """In millions; test_released.py compares the last digit with timm and transformers."""
    count = patch.released_parameters(zoo.ENCODERS[name])
    assert count / 1e6 == pytest.approx(zoo.ENCODERS[name].millions, abs=0.011)


@pytest.mark.parametrize("name", zoo.ENCODERS)
def test_an_image_becomes_a_feature_of_the_width_it_says(name):
    row = zoo.ENCODERS[name]
    images = jax.ShapeDtypeStruct((2, row.tile_px, row.tile_px, 3), "uint8")
    out = jax.eval_shape(lambda p, x: patch.encode(row, p, x), patch.abstract(row), images)
    assert out.shape == (2, row.width)


@pytest.mark.parametrize("name", zoo.ENCODERS)
def test_every_row_is_filled(name):
    row = zoo.ENCODERS[name]
    assert name == row.name == name.lower()
    assert row.licence and row.source and row.millions > 1
    assert row.positions in ("patches", "cls+patches", "cls+registers+patches")
    assert row.output in ("cls", "cls+mean", "pooler")
    assert (row.pooler is not None) == (row.output == "pooler")
    assert row.model["resample"] in RULES if "resample" in row.model else True
    assert row.input.crop % row.model["patch"] == 0
    assert row.input.resize >= row.input.crop
    if "NC" in row.licence or "Non-Commercial" in row.licence or "non-commercial" in row.licence:
        assert row.terms


def test_the_launcher_lists_shows_and_refuses(capsys):
    launcher.main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(zoo.ROWS)
    assert lines[1].split()[:3] == ["uni", "303.4", "M"]
    launcher.main(["list", "--json"])
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == set(zoo.ENCODERS)
    launcher.main(["show", "virchow2"])
    shown = capsys.readouterr().out
    assert "cls+mean, 2560 wide" in shown and "paige-ai/Virchow2" in shown and "ask them" in shown
    with pytest.raises(SystemExit) as stop:
        launcher.main(["show", "uni9"])
    assert stop.value.code == 2
    assert "no encoder 'uni9'. Expected one of uni, uni2-h" in capsys.readouterr().err


def test_terms_are_found_by_the_name_a_converted_encoder_gets():
    assert zoo.terms_of("uni-1a2b3c4d")["licence"] == "CC-BY-NC-ND-4.0"
    assert zoo.terms_of("conch-v1.5-1a2b3c4d")["source"] == "MahmoodLab/conchv1_5"
    assert zoo.terms_of("hed_texture") == {} == zoo.terms_of("mine-1a2b3c4d")
