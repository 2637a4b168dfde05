"""Released weights as our parameters: every published architecture against its authors' definition.

tests/references/make_encoders.py built each of them two blocks deep and at full width, drew every entry
of its state dict and kept the answers; here the same entries go through the conversion.
"""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.encoders import patch, released, zoo
from pathme_jax.errors import UserError
from pathme_jax.models.pooler import AttentionalPooler
from pathme_jax.models.vit import ViT
from pathme_jax.training.contract import flat, nested

REFERENCES = Path(__file__).parents[1] / "references"
made: Any = runpy.run_path(str(REFERENCES / "make_encoders.py"))
KEYS: dict[str, dict[str, list[int]]] = json.loads((REFERENCES / "encoder_keys.json").read_text())
ANSWERS = np.load(REFERENCES / "encoder_answers.npz")
PARAMETERS = json.loads((REFERENCES / "encoder_parameters.json").read_text())
TOLERANCE = 1e-5  # the largest difference over the largest value


def two_deep(name: str) -> zoo.Definition:
    definition = zoo.find(name)
    return dataclasses.replace(definition, model={**definition.model, "depth": made["DEPTH"]})


def drawn(name: str) -> dict[str, np.ndarray]:
    return {key: made["draw"](key, shape) for key, shape in KEYS[name].items()}


def gap(name: str, size: str, params: Any, apply: Any) -> float:
    """Of our answer to the stored one, relative to the largest value."""
    out = made["stored"](apply(params, jnp.asarray(made["image"](*made["sizes"](name)[size]))))
    kept = [what for what in ("rows", "pooled") if f"{name}/{size}/{what}" in ANSWERS]
    expected = {what: ANSWERS[f"{name}/{size}/{what}"] for what in kept}
    return max(float(np.abs(out[w] - x).max() / np.abs(x).max()) for w, x in expected.items())


def applied(definition: zoo.Definition) -> Any:
    """(params, normalised images) to what `stored` takes; compiled."""

    def apply(params: Any, images: Any) -> dict[str, Any]:
        vit: Any = ViT(**definition.model)
        out = vit.apply({"params": params["backbone"]}, images)
        if definition.pooler is None:
            return out
        pooler: Any = AttentionalPooler(**definition.pooler)
        tokens = jnp.concatenate([out["cls"][:, None], out["tokens"]], 1)
        return {**out, "pooled": pooler.apply({"params": params["pooler"]}, tokens)}

    return jax.jit(apply)


# ---- their answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(KEYS))
def test_a_converted_encoder_answers_as_its_authors_definition(name):
    """At the size it is fed and at another; and with any one block broken it does not."""
    definition, state = two_deep(name), drawn(name)
    params, apply = released.to_params(dict(state), definition, "file"), applied(definition)
    assert gap(name, "native", params, apply) < TOLERANCE
    assert gap(name, "other", params, apply) < TOLERANCE
    for layer in range(made["DEPTH"]):
        for path in ("attention/out/kernel", "mlp/down/kernel"):
            leaves = flat(params)
            leaf = f"{released.STACKED}{path}"
            leaves[leaf] = leaves[leaf].copy()
            leaves[leaf][layer] *= 0.9
            assert gap(name, "other", nested(leaves), apply) > 10 * TOLERANCE, (path, layer)


POOLER = r".*(attn_pool|ln)_contrast.*"


@pytest.mark.parametrize(
    "name, keys",
    [
        ("gigapath-flash", ".*"),
        ("lunit-s8", ".*"),
        ("dinov2-small-reg4", ".*"),
        ("phikon", ".*"),
        ("hibou-b", r"embeddings.*|encoder\.layer\.1.*"),
        ("conch", POOLER),
        ("conch-v1.5", POOLER),
    ],
)
def test_no_key_of_a_released_file_is_read_in_vain(name, keys):
    """Each moved by a tenth of its size moves the answer; the mask token and keys listed as unused do not."""
    definition, state = two_deep(name), drawn(name)
    apply = applied(definition)
    moves = {key: value for key, value in state.items() if re.fullmatch(keys, key)}
    assert len(moves) > 5
    for key, value in moves.items():
        noise = 0.1 * made["draw"](f"other {key}", value.shape)
        moved = released.to_params({**state, key: value + noise}, definition, "file")
        silent = released.is_unused(key, definition) or key.endswith("mask_token")
        bias_of_keys = re.search(r"attention\.key\.bias$", key)  # softmax does not see it
        if silent or bias_of_keys:
            assert gap(name, "other", moved, apply) < TOLERANCE, key
        else:
            assert gap(name, "other", moved, apply) > 10 * TOLERANCE, key


# ---- other dialects of the same weights ----------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[zoo.Definition, dict[str, Any]]:
    """H0-mini's form (registers, gated, LayerScale), 12 wide, and parameters drawn by path."""
    row = zoo.find("h0-mini")
    model = {**row.model, "depth": 2, "width": 12, "heads": 2, "grid": 3, "patch": 4}
    definition = dataclasses.replace(row, model=model)
    shapes = flat(patch.abstract(definition))
    return definition, nested({k: made["draw"](k, x.shape) for k, x in shapes.items()})


def same(one: Any, other: Any) -> None:
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        np.testing.assert_array_equal(value, other[path], err_msg=path)


def without_mask_token(params: Any) -> Any:
    backbone = {**params["backbone"], "mask_token": np.zeros(12, np.float32)}
    return {**params, "backbone": backbone}


@pytest.fixture()
def state(small) -> dict[str, np.ndarray]:
    return released.to_timm_state(small[1])


def test_our_own_export_under_timm_names_comes_back(small, state):
    definition, params = small
    same(released.to_params(state, definition, "file"), without_mask_token(params))


def test_our_own_export_for_transformers_comes_back(small):
    definition, params = small
    state = released.to_transformers_state(params, definition)
    assert "encoder.layer.1.mlp.weights_in.weight" in state
    same(released.to_params(state, definition, "file"), params)


def test_transformers_5_in_memory_is_read_as_its_files_are(small):
    definition, params = small
    state = {}
    for key, value in released.to_transformers_state(params, definition).items():
        key = re.sub(r"attention\.attention\.(.)\w+", r"attention.\1_proj", key)
        key = key.replace("attention.output.dense", "attention.o_proj")
        if ".weights_in." in key:
            gate, up = np.split(value, 2)
            state[key.replace("weights_in", "gate_proj")] = gate
            state[key.replace("weights_in", "up_proj")] = up
        else:
            state[key.replace("weights_out", "down_proj")] = value
    same(released.to_params(state, definition, "file"), params)


@pytest.mark.parametrize("prefix", ["module.", "teacher.backbone.", "visual.trunk.", "model."])
def test_prefixes_of_training_code_are_dropped(small, state, prefix):
    definition, params = small
    state = {prefix + key: value for key, value in state.items()}
    same(released.to_params(state, definition, "file"), without_mask_token(params))


@pytest.mark.parametrize("others", [1, 5])
def test_positions_of_cls_and_registers_are_added_to_these_tokens(small, state, others):
    definition, params = small
    own = made["draw"]("own", (1, others, 12))
    state["pos_embed"] = np.concatenate([own, state["pos_embed"]], 1)
    backbone = released.to_params(state, definition, "file")["backbone"]
    tokens = np.concatenate([backbone["cls_token"], backbone["registers"]])
    before = np.concatenate([params["backbone"]["cls_token"], params["backbone"]["registers"]])
    np.testing.assert_allclose(tokens[:others] - before[:others], own[0], atol=1e-6)
    np.testing.assert_array_equal(tokens[others:], before[others:])
    np.testing.assert_array_equal(backbone["positions"], params["backbone"]["positions"])


def test_half_precision_becomes_float32(small, state):
    definition, _ = small
    halves = {key: value.astype(jnp.bfloat16) for key, value in state.items()}
    params = flat(released.to_params(halves, definition, "file"))
    assert {x.dtype for x in params.values()} == {np.dtype("float32")}


def test_an_encoder_without_layer_scale_has_ones_for_transformers(small):
    definition, _ = small
    definition = dataclasses.replace(definition, model={**definition.model, "layer_scale": 0.0})
    shapes = flat(patch.abstract(definition))
    params = nested({k: made["draw"](k, x.shape) for k, x in shapes.items()})
    state = released.to_transformers_state(params, definition)
    np.testing.assert_array_equal(state["encoder.layer.0.layer_scale1.lambda1"], np.ones(12))


def test_a_pooler_goes_to_no_class_of_transformers():
    with pytest.raises(UserError, match="no attentional pooler"):
        released.to_transformers_state({}, zoo.find("conch"))


# ---- what is refused -----------------------------------------------------------------------------------


def refusal(state: dict[str, np.ndarray], definition: zoo.Definition) -> str:
    with pytest.raises(UserError) as error:
        released.to_params(state, definition, "x.safetensors")
    assert error.value.problem.startswith("x.safetensors: ")
    return error.value.problem


def test_a_missing_key_is_named(small, state):
    del state["blocks.1.mlp.fc1.bias"]
    assert "1 missing: blocks.1.mlp.fc1.bias" in refusal(state, small[0])


def test_an_unknown_key_is_named(small, state):
    state["head.weight"] = np.zeros((3, 12), np.float32)
    assert "1 unknown: head.weight" in refusal(state, small[0])


def test_another_depth_names_the_first_keys_and_counts_all(small, state):
    deeper = dataclasses.replace(small[0], model={**small[0].model, "depth": 3})
    text = refusal(state, deeper)
    assert "14 missing: blocks.2.attn.proj.bias" in text and text.endswith("…")


def test_another_width_names_the_shapes(small, state):
    wider = dataclasses.replace(small[0], model={**small[0].model, "width": 24})
    assert "of another shape" in refusal(state, wider)
    assert "instead of" in refusal(released.to_timm_state(small[1]), wider)


def test_another_number_of_registers_names_the_shapes(small, state):
    fewer = dataclasses.replace(small[0], model={**small[0].model, "registers": 2})
    assert "reg_token (1, 4, 12) instead of (1, 2, 12)" in refusal(state, fewer)


def test_another_patch_size_names_the_shapes(small, state):
    coarser = dataclasses.replace(small[0], model={**small[0].model, "patch": 8})
    assert "patch_embed.proj.weight (12, 3, 4, 4) instead of (12, 3, 8, 8)" in refusal(
        state, coarser
    )


def test_positions_of_another_size_are_not_interpolated(small, state):
    finer = dataclasses.replace(small[0], model={**small[0].model, "grid": 4})
    text = refusal(state, finer)
    assert "a grid of 3 x 3" in text and "a grid of 4 x 4" in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(small, state, value):
    state["blocks.1.norm2.weight"][3] = value
    assert "norm_mlp/scale has values that are not finite" in refusal(state, small[0])


def test_two_models_in_one_file_are_refused(small, state):
    state["teacher.norm.weight"] = state["norm.weight"]
    assert "norm.weight is there twice" in refusal(state, small[0])


# ---- sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_an_encoder_has_as_many_parameters_as_its_authors_definition(name):
    assert patch.released_parameters(zoo.find(name)) == PARAMETERS[name]
