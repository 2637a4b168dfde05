"""The cost of a step, against counts made by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pathme_jax.errors import UserError
from pathme_jax.training.cost import (
    collectives,
    matmul_flops,
    memory,
    table,
)

B, D, H, LAYERS = 8, 16, 64, 6
X = jax.ShapeDtypeStruct((B, D), jnp.float32)
UP = jax.ShapeDtypeStruct((LAYERS, D, H), jnp.float32)
DOWN = jax.ShapeDtypeStruct((LAYERS, H, D), jnp.float32)
LAYER = 2 * (2 * B * D * H)  # two products of (B, D) with (D, H)


def block(x: jax.Array, weights: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return x + jax.nn.gelu(x @ weights[0]) @ weights[1], None


def stack(up: Any, down: Any, x: Any, block: Any = block) -> jax.Array:
    return (jax.lax.scan(block, x, (up, down))[0] ** 2).sum()


# ---------------------------------------------------------------------------------------- FLOPs


def test_a_dense_layer_and_a_batched_product():
    assert matmul_flops(jnp.dot, X, jax.ShapeDtypeStruct((D, 5), jnp.float32)) == 2 * B * D * 5
    q = jax.ShapeDtypeStruct((2, 7, 3, 4), jnp.bfloat16)
    assert matmul_flops(lambda q: jnp.einsum("bnhc,bmhc->bhnm", q, q), q) == 2 * (2 * 3) * 7 * 7 * 4


def test_a_convolution():
    """A 3x3 convolution of 4 to 6 channels: 9 x 4 products for each value it makes; in two groups, 9 x 2."""
    image = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32)
    for groups in (1, 2):
        kernel = jax.ShapeDtypeStruct((3, 3, 4 // groups, 6), jnp.float32)

        def convolve(x: Any, k: Any, groups: int = groups) -> Any:
            layout = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, k, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
            )

        assert matmul_flops(convolve, image, kernel) == 2 * (8 * 8 * 6) * 9 * (4 // groups)


def test_a_scanned_stack_counts_every_layer_where_xla_counts_one():
    assert matmul_flops(stack, UP, DOWN, X) == LAYERS * LAYER
    reported = jax.jit(stack).lower(UP, DOWN, X).compile().cost_analysis() or {}
    assert LAYER <= reported["flops"] < 2 * LAYER, (
        "XLA counts loops now: matmul_flops may no longer be needed"
    )


def test_a_gradient_costs_twice_its_forward_and_remat_one_product_more():
    """d(x W) = dy W^T and x^T dy. Whole remat computes the first product of a layer again; the
    second's result is needed by nobody."""
    gradient = jax.grad(stack, argnums=(0, 1, 2))
    assert matmul_flops(gradient, UP, DOWN, X) == 3 * LAYERS * LAYER

    def again(up: Any, down: Any, x: Any) -> jax.Array:
        return stack(up, down, x, jax.checkpoint(block, prevent_cse=False))  # pyright: ignore

    gradient = jax.grad(again, argnums=(0, 1, 2))
    assert matmul_flops(gradient, UP, DOWN, X) == 3.5 * LAYERS * LAYER


def test_jit_custom_vjp_and_the_dearest_branch_are_entered():
    @jax.custom_vjp
    def product(x: Any, w: Any) -> Any:
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: (dy @ kept[1].T, kept[0].T @ dy))
    w = jax.ShapeDtypeStruct((D, D), jnp.float32)
    one = 2 * B * D * D
    assert matmul_flops(jax.jit(product), X, w) == one
    assert matmul_flops(jax.grad(lambda x, w: product(x, w).sum(), argnums=(0, 1)), X, w) == 3 * one

    def choose(x: Any, w: Any) -> Any:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w @ w, x)

    assert matmul_flops(choose, X, w) == 2 * one


def test_a_loop_of_unknown_length_is_refused_only_where_it_matters():
    def loop(turn: Any) -> Any:
        return lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, turn, x)

    square = jax.ShapeDtypeStruct((D, D), jnp.float32)
    assert matmul_flops(loop(lambda x: x + 1), square) == 0
    with pytest.raises(UserError, match="while_loop"):
        matmul_flops(loop(lambda x: x @ x), square)


# ---------------------------------------------------------------------------------- communication

_EIGHT = """
import json, jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pathme_jax.training.cost import collectives, memory, state_bytes
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

def abstract(shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

def stack(w, x):
    return (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0] ** 2).mean()

def nested(w, x):
    return jax.lax.scan(lambda x, _: (jnp.sin(x) * stack(w, x), None), x, None, length=3)[0].sum()

def dense(w, x):
    return ((x @ w) ** 2).mean()

x = abstract((32, 64), "data")
split = abstract((6, 64, 64), None, None, "data")
whole = abstract((64, 64))
gradient = jax.jit(jax.grad(dense), out_shardings=whole.sharding).lower(whole, x).compile()
print(json.dumps({
    "scan": collectives(jax.jit(stack).lower(split, x).compile()),
    "nested": collectives(jax.jit(nested).lower(split, x).compile()),
    "gradient": collectives(gradient),
    "memory": memory(gradient),
    "state": state_bytes({"trained": {"w": split}, "ema": {"w": whole}, "opt": [split, (split,)]}),
}))
"""


@pytest.fixture(scope="module")
def eight() -> dict[str, Any]:
    """What programs for eight devices hold."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", _EIGHT], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_gather_inside_a_scan_counts_every_turn(eight: dict[str, Any]):
    """Each of 6 layers gathers its own (64, 64) of float32, in two nested loops 3 x 6 times."""
    assert eight["scan"]["all-gather"] == {"count": 6, "bytes": 6 * 64 * 64 * 4}
    assert eight["nested"]["all-gather"] == {"count": 18, "bytes": 18 * 64 * 64 * 4}


def test_a_data_parallel_gradient_is_reduced_once_and_whole(eight: dict[str, Any]):
    assert eight["gradient"] == {"all-reduce": {"count": 1, "bytes": 64 * 64 * 4}}


def test_one_device_sends_nothing():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    x = jax.ShapeDtypeStruct(
        (B, D), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    assert collectives(jax.jit(jax.grad(stack)).lower(UP, DOWN, x).compile()) == {}


class Text:
    """A compiled program of which only the text is known."""

    def __init__(self, text: str):
        self.text = text

    def as_text(self) -> str:
        return self.text


def test_asynchronous_forms_count_once_by_their_result():
    """GPUs and TPUs start a collective and wait for it later; the start's type holds operands too."""
    program = Text("""
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[16,8]) -> bf16[2,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  ROOT %rs = bf16[2,8]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%left (p: f32[4]) -> f32[4] {
  ROOT %permute = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1}}
}

%right (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0)
}

ENTRY %main (x: bf16[2,8]) -> f32[3] {
  %start = (bf16[2,8]{1,0}, bf16[16,8]{1,0:T(8,128)}) all-gather-start(%x), dimensions={0}
  %full = bf16[16,8]{1,0:T(8,128)} all-gather-done(%start)
  %async = ((bf16[16,8]), bf16[2,8], u32[]) async-start(%full), calls=%wrapped
  %shard = bf16[2,8]{1,0} async-done(%async)
  %either = f32[4]{0} conditional(%which, %a, %b), branch_computations={%left, %right}
  ROOT %both = (f32[3]{0}, /*index=1*/pred[5]{0}) all-reduce(%y, %z), to_apply=%add
}
""")
    assert collectives(program) == {
        "all-gather": {"count": 1, "bytes": 16 * 8 * 2},
        "reduce-scatter": {"count": 1, "bytes": 2 * 8 * 2},
        "collective-permute": {"count": 1, "bytes": 16},
        "all-reduce": {"count": 1, "bytes": 3 * 4 + 5},
    }


# ---------------------------------------------------------------------------- memory and the table


def test_memory_of_a_compiled_step(eight: dict[str, Any]):
    """On one device: a whole (64, 64) and an eighth of (32, 64) in, a whole (64, 64) out."""
    planned = eight["memory"]
    assert planned["argument"] == 4 * (64 * 64 + 4 * 64)
    assert planned["output"] == 4 * 64 * 64 and planned["alias"] == 0
    assert planned["temp"] > 0


def test_a_donated_state_is_aliased():
    x = jnp.zeros((256, 256))
    planned = memory(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert planned["alias"] == planned["argument"] == planned["output"] == 256 * 256 * 4


def test_state_bytes_follow_the_shardings(eight: dict[str, Any]):
    shard = 6 * 64 * 64 * 4 // 8
    assert eight["state"] == {"trained": shard, "ema": 64 * 64 * 4, "opt": 2 * shard}


def test_the_table_shows_every_parameter_and_the_total():
    kernel = {"shape": (24, 64, 192), "sharding": "cut"}
    moved = {"lr": np.geomspace(0.1, 0.9, 24).reshape(24, 1, 1), "decay": 1.0, "frozen_until": 1250}
    text = table(
        [
            {"path": "student/kernel", "role": "trained", **kernel, **moved},
            {"path": "teacher/kernel", "role": "ema", **kernel},
            {"path": "scale", "shape": (), "role": "trained", "sharding": "whole"},
        ]
    )
    head, student, teacher, scale, total = (re.split("  +", line) for line in text.splitlines())
    assert head == ["path", "shape", "role", "lr", "decay", "frozen until", "sharding"]
    assert student[1:] == ["24x64x192", "trained", "0.1 to 0.9", "1", "1250", "cut"]
    assert teacher[1:] == ["24x64x192", "ema", "-", "-", "-", "cut"]
    assert scale[1] == "scalar"
    assert total == [f"3 arrays, {2 * 24 * 64 * 192 + 1:,} parameters"]
    lines = text.splitlines()
    assert lines[0].index("sharding") == lines[1].index("cut") == lines[3].index("whole")
