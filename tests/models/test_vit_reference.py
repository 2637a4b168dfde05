"""The ViT against timm's (tests/references/make_vit.py), and its parameter tree against DINOv2's.

Every parameter is drawn at order 0.1 to 1, so that none is too small to be missed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.models.vit import SIZES, ViT

REFERENCES = Path(__file__).parents[1] / "references"
GOLDEN = Path(__file__).parent / "golden_vit.json"
make_vit: Any = runpy.run_path(str(REFERENCES / "make_vit.py"))
TOLERANCE = 1e-5  # the largest difference over the largest value


def _apply(values: dict[str, Any], case: str, size: str) -> Any:
    """The outputs of our ViT with parameters given by path."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        *rooms, name = path.split("/")
        place = nested
        for room in rooms:
            place = place.setdefault(room, {})
        place[name] = value
    return ViT(**make_vit["CASES"][case]).apply({"params": nested}, make_vit["images"](size))


def _ours(case: str, size: str) -> dict[str, Any]:
    values = make_vit["parameters"](make_vit["CASES"][case])
    return jax.jit(lambda values: _apply(values, case, size))(values)


def _gap(out: dict[str, Any], expected: Any, size: str = "") -> float:
    """The larger of both outputs' differences, relative to the largest value."""
    return max(
        float(np.abs(out[name] - expected[size + name]).max() / np.abs(expected[size + name]).max())
        for name in ("cls", "tokens")
    )


@pytest.mark.parametrize("size", list(make_vit["SIZES"]))
@pytest.mark.parametrize("case", list(make_vit["CASES"]))
def test_it_answers_as_timm_did(case, size):
    """Three blocks of the plain and of the SwiGLU form with registers, at the size of the position grid
    and at another shape."""
    assert _gap(_ours(case, size), np.load(REFERENCES / f"vit_{case}.npz"), size + "/") < TOLERANCE


@pytest.mark.parametrize("size", list(make_vit["SIZES"]))
@pytest.mark.parametrize("case", list(make_vit["CASES"]))
def test_it_answers_as_timm_does_here(case, size):
    pytest.importorskip("torch")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("no timm")
    fields = make_vit["CASES"][case]
    expected = make_vit["answer"](make_vit["parameters"](fields), fields, size)
    assert _gap(_ours(case, size), expected) < TOLERANCE


def _swapped(gelu):
    return lambda x, approximate=True: gelu(x, not approximate)


@pytest.mark.parametrize(
    ("case", "broken"),
    [
        ("mlp", lambda patch: patch.setattr("flax.linen.gelu", _swapped(jax.nn.gelu))),
        ("swiglu_registers", lambda patch: patch.setattr("flax.linen.silu", lambda x: x)),
        (
            "swiglu_registers",
            lambda patch: patch.setattr("jax.numpy.split", lambda x, n, a: np.split(x, n, a)[::-1]),
        ),
        ("mlp", lambda patch: patch.setattr("jax.nn.softmax", lambda x, axis: jnp.exp(x) / 37)),
    ],
    ids=["tanh gelu", "no silu", "halves of SwiGLU swapped", "no softmax"],
)
def test_a_broken_block_would_be_noticed(case, broken, monkeypatch):
    """The references can tell: what the tests above guard is within their sight."""
    expected = np.load(REFERENCES / f"vit_{case}.npz")
    broken(monkeypatch)
    assert _gap(_ours(case, "native"), expected, "native/") > 2 * TOLERANCE


@pytest.mark.parametrize("case", list(make_vit["CASES"]))
def test_every_parameter_is_within_the_sight_of_the_references(case):
    """A parameter left at its start would change the answer; mask_token has no part in it."""
    names = make_vit["parameters"](make_vit["CASES"][case])
    answer = jax.jit(lambda values: _apply(values, case, "native"))
    out = answer(names)
    for path, value in names.items():
        if path != "mask_token":
            fresh = np.full_like(value, 1.0 if "scale" in path else 0.0)
            assert _gap(answer({**names, path: fresh}), out) > 2 * TOLERANCE, path


# ---- names and numbers -------------------------------------------------------------------------------


def _shapes(**fields: Any) -> dict[str, list[int]]:
    image = jax.ShapeDtypeStruct((1, 14, 14, 3), jnp.float32)
    tree = jax.eval_shape(ViT(patch=14, grid=37, **fields).init, jax.random.key(0), image)["params"]
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): list(leaf.shape) for path, leaf in paths}


def golden() -> dict[str, dict[str, list[int]]]:
    return {
        "small, 4 registers": _shapes(**SIZES["small"], registers=4),
        "giant, depth 2": _shapes(**{**SIZES["giant"], "depth": 2}),
    }


def test_the_parameter_tree_is_the_committed_one():
    """Checkpoints, sharding rules and learning-rate rules go by these names. To change them on purpose:

    python tests/models/test_vit_reference.py
    """
    assert golden() == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("small", 22_056_576),
        ("base", 86_580_480),
        ("large", 304_368_640),
        ("giant", 1_136_480_768),
    ],
)
def test_sizes_have_dinov2s_published_number_of_parameters(size, published):
    """DINOv2 gives CLS a row of the positions; here that row is part of cls_token."""
    shapes = _shapes(**SIZES[size])
    assert sum(map(math.prod, shapes.values())) + SIZES[size]["width"] == published


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n")
