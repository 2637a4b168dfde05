"""`python -m pathme_jax.convert`: files as publishers leave them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pathme_jax import convert, encoders
from pathme_jax.encoders import conversion, patch, released, weight_files, zoo
from pathme_jax.errors import UserError
from pathme_jax.training.contract import flat, nested

CONFIG = dict(
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=4,
    num_register_tokens=4,
    layer_norm_eps=1e-6,
    mean=[0.707223, 0.578729, 0.703617],
    std=[0.211883, 0.230117, 0.177517],
)


@pytest.fixture()
def definition(monkeypatch: pytest.MonkeyPatch) -> zoo.Definition:
    """A public encoder of H0-mini's form that is 12 wide."""
    row = zoo.find("h0-mini")
    small = dataclasses.replace(
        row,
        name="small",
        model={**row.model, "depth": 2, "width": 12, "heads": 2, "grid": 3, "patch": 4},
        input=dataclasses.replace(row.input, resize=12, crop=12),
        unused=("head.*",),
    )
    monkeypatch.setitem(zoo.ENCODERS, "small", small)
    return small


@pytest.fixture()
def params(definition) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = flat(patch.abstract(definition)).items()
    drawn = {path: rng.normal(size=x.shape).astype(np.float32) for path, x in shapes}
    return nested(drawn)


@pytest.fixture()
def weights(definition, params, tmp_path) -> Path:
    """A released file under timm's names."""
    path = tmp_path / "weights.safetensors"
    save_file(released.to_timm_state(params), path)
    return path


@pytest.fixture()
def folder(definition, params, tmp_path) -> Path:
    """A Hugging Face folder."""
    path = tmp_path / "hub"
    path.mkdir()
    save_file(released.to_transformers_state(params, definition), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def refusal(weights: Path, out: Path) -> str:
    with pytest.raises(UserError) as error:
        conversion.convert("small", weights, out)
    assert not out.exists() or not (out / "params.safetensors").exists()
    return str(error.value)


# ---- what comes out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["weights", "folder"])
def test_a_converted_folder_loads_and_encodes(definition, params, what, tmp_path, request):
    convert.main(
        f"--encoder small --weights {request.getfixturevalue(what)} --out {tmp_path / 'out'}".split()
    )
    images = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    features = encoders.load(tmp_path / "out")(images)
    expected = patch.encode(definition, params, jnp.asarray(images))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_the_launcher_tells_size_terms_and_how_to_load(definition, weights, tmp_path, capsys):
    convert.main(f"--encoder small --weights {weights} --out {tmp_path / 'out'}".split())
    text = capsys.readouterr().out
    size = patch.released_parameters(definition)
    for part in (f"{size:,} parameters", definition.licence, definition.terms, "encoders.load("):
        assert part in text


def test_the_folder_records_where_its_weights_come_from(definition, weights, tmp_path):
    conversion.convert("small", weights, tmp_path / "out")
    (made_from,) = encoders.load(tmp_path / "out").made_from
    assert made_from == {
        "name": "small",
        "licence": definition.licence,
        "terms": definition.terms,
        "source": definition.source,
        "sha256": weight_files.fingerprint([weights]),
    }


def test_unused_keys_are_dropped_and_counted(definition, params, tmp_path):
    state = released.to_timm_state(params)
    save_file({**state, "head.weight": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    assert conversion.convert("small", tmp_path / "x.safetensors", tmp_path / "out").dropped == 1


def test_a_dry_run_checks_and_writes_nothing(weights, tmp_path):
    out = tmp_path / "out"
    assert conversion.convert("small", weights, out, dry_run=True).outcome == "dry run"
    assert not out.exists()


def test_the_same_conversion_again_does_nothing(weights, tmp_path):
    out = tmp_path / "out"
    first = conversion.convert("small", weights, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = conversion.convert("small", weights, out)
    assert dataclasses.replace(again, outcome="written") == first
    assert again.outcome == "there already"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_a_set_of_files_is_one_state_dict(params, definition, tmp_path):
    state = released.to_timm_state(params)
    parts = {"a.safetensors": list(state)[::2], "b.safetensors": list(state)[1::2]}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / name)
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert conversion.convert("small", tmp_path, tmp_path / "out").outcome == "written"
    (tmp_path / "b.safetensors").unlink()
    assert "1 of 2 files it names are missing: b.safetensors" in refusal(
        tmp_path, tmp_path / "other"
    )


def test_bfloat16_files_are_read(definition, params, tmp_path):
    state = released.to_timm_state(params)
    halves = {key: value.astype(jnp.bfloat16) for key, value in state.items()}
    save_file(halves, tmp_path / "x.safetensors")
    conversion.convert("small", tmp_path / "x.safetensors", tmp_path / "out")
    found = encoders.load(tmp_path / "out").params["backbone"]["norm"]["scale"]
    np.testing.assert_array_equal(found, halves["norm.weight"].astype(np.float32))


# ---- what is refused -----------------------------------------------------------------------------------


def test_a_folder_of_another_encoder_is_not_overwritten(params, definition, weights, tmp_path):
    out = tmp_path / "out"
    conversion.convert("small", weights, out)
    before = (out / "encoder.json").read_text()
    state = released.to_timm_state(params)
    save_file({**state, "norm.bias": state["norm.bias"] + 1}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=f"--out {out} holds small-"):
        conversion.convert("small", tmp_path / "other.safetensors", out)
    assert (out / "encoder.json").read_text() == before


def test_a_folder_of_something_else_is_not_overwritten(weights, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "is no encoder's folder" in refusal(weights, out)
    assert (out / "thesis.tex").exists()


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("num_attention_heads", 3, "heads 3 instead of 2"),
        ("layer_norm_eps", 1e-5, "epsilon 1e-05 instead of 1e-06"),
        ("hidden_size", 24, "width 24 instead of 12"),
        ("num_register_tokens", 0, "registers 0 instead of 4"),
        ("mean", [0.5, 0.5, 0.5], "mean [0.5, 0.5, 0.5] instead of"),
    ],
)
def test_a_config_that_contradicts_the_definition_is_refused(folder, tmp_path, field, value, said):
    (folder / "config.json").write_text(json.dumps({**CONFIG, field: value}))
    assert said in refusal(folder, tmp_path / "out")


def test_a_config_of_timm_is_compared_too(folder, tmp_path):
    config = {"model_args": {"num_heads": 4}, "pretrained_cfg": {"std": [0.1, 0.1, 0.1]}}
    (folder / "config.json").write_text(json.dumps(config))
    text = refusal(folder, tmp_path / "out")
    assert "heads 4 instead of 2" in text and "std [0.1, 0.1, 0.1]" in text


def test_weights_beside_a_wrong_config_are_taken_when_given_themselves(folder, tmp_path):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "mean": [0.5, 0.5, 0.5]}))
    done = conversion.convert("small", folder / "model.safetensors", tmp_path / "out")
    assert done.outcome == "written"


def test_a_truncated_file_is_refused(weights, tmp_path):
    weights.write_bytes(weights.read_bytes()[:-40])
    assert "not a whole safetensors file" in refusal(weights, tmp_path / "out")


def test_an_unknown_encoder_is_refused(weights, tmp_path):
    with pytest.raises(UserError, match="no encoder 'unni'"):
        conversion.convert("unni", weights, tmp_path / "out")


def test_a_missing_file_is_named(definition, tmp_path):
    assert "nowhere: no such file" in refusal(tmp_path / "nowhere", tmp_path / "out")


def test_an_empty_folder_is_refused(definition, tmp_path):
    assert "no weights" in refusal(tmp_path, tmp_path / "out")


def test_a_folder_of_several_candidates_asks_which(definition, weights, tmp_path):
    weights.with_name("again.safetensors").write_bytes(weights.read_bytes())
    text = refusal(tmp_path, tmp_path / "out")
    assert "again.safetensors, weights.safetensors" in text


def test_another_kind_of_file_is_refused(definition, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"x")
    assert "cannot read *.onnx" in refusal(tmp_path / "x.onnx", tmp_path / "out")


def test_a_pickle_without_torch_says_what_to_install(definition, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pth").write_bytes(b"x")
    assert "pathme_jax[convert]" in refusal(tmp_path / "x.pth", tmp_path / "out")


# ---- pickles of PyTorch --------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["", "teacher", "model", "state_dict"])
def test_a_pickle_is_read_from_within_its_wrapper(definition, params, wrapper, tmp_path):
    torch = pytest.importorskip("torch")
    state = released.to_timm_state(params).items()
    content: Any = {f"backbone.{key}": torch.tensor(value) for key, value in state}
    torch.save({wrapper: content, "epoch": 3} if wrapper else content, tmp_path / "x.pth")
    conversion.convert("small", tmp_path / "x.pth", tmp_path / "out")
    found = encoders.load(tmp_path / "out").params["backbone"]["positions"]
    np.testing.assert_array_equal(found, params["backbone"]["positions"])


def test_a_pickle_of_before_pytorch_1_6_in_half_precision_is_read(definition, params, tmp_path):
    torch = pytest.importorskip("torch")
    state = released.to_timm_state(params).items()
    content = {key: torch.tensor(value).bfloat16() for key, value in state}
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert conversion.convert("small", tmp_path / "x.bin", tmp_path / "out").outcome == "written"


def test_a_pickle_that_would_run_code_is_refused_and_named(definition, tmp_path):
    torch = pytest.importorskip("torch")

    torch.save({"a": Path("x")}, tmp_path / "x.pth")
    text = refusal(tmp_path / "x.pth", tmp_path / "out")
    assert "wants to run pathlib" in text


def test_a_truncated_pickle_is_refused(definition, params, tmp_path):
    torch = pytest.importorskip("torch")
    state = released.to_timm_state(params).items()
    torch.save({key: torch.tensor(value) for key, value in state}, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(whole[: len(whole) // 2])
    assert "x.pth: not a" in refusal(tmp_path / "x.pth", tmp_path / "out")


def test_a_pickle_of_something_else_is_refused(definition, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "x.pth")
    assert "not a dictionary of tensors (epoch, lr)" in refusal(
        tmp_path / "x.pth", tmp_path / "out"
    )
