"""Attention, stochastic depth and position interpolation, as every encoder uses them."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.models.transformer import (
    Block,
    FeedForward,
    Stack,
    add_rows,
    attend,
    drop_path_rows,
    take_rows,
)

draw = jax.jit(drop_path_rows, static_argnums=(1, 2, 3, 4))


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_attention_is_softmax_over_the_valid_keys():
    query, key, value = (_random(i, 2, 5, 3, 4) for i in range(3))
    valid = np.random.default_rng(3).random((2, 5, 5)) < 0.6
    valid[0, 2] = False
    expected = np.zeros((2, 5, 3, 4))
    for b in range(2):
        for n in range(5):
            for h in range(3):
                at = np.flatnonzero(valid[b, n])
                logit = key[b, at, h] @ query[b, n, h] / 2.0
                weight = np.exp(logit) / np.exp(logit).sum()
                expected[b, n, h] = weight @ value[b, at, h]
    np.testing.assert_allclose(attend(query, key, value, valid), expected, atol=1e-5)
    every = attend(query, key, value, np.ones((2, 5), bool))
    np.testing.assert_allclose(every, attend(query, key, value, None), atol=1e-6)


def test_a_query_without_a_valid_key_gets_zeros_and_a_finite_gradient():
    query, key, value = (jnp.asarray(_random(i, 1, 3, 1, 4)) for i in range(3))
    valid = jnp.zeros((1, 3), bool)
    value_out, slope = jax.value_and_grad(lambda q, k, v: attend(q, k, v, valid).sum(), (0, 1, 2))(
        query, key, value
    )
    assert float(value_out) == 0
    assert all((np.asarray(s) == 0).all() for s in slope)


def test_what_stands_in_an_invalid_key_changes_nothing():
    query, key, value = (_random(i, 1, 4, 2, 3) for i in range(3))
    valid = np.array([[True, False, True, True]])
    before = attend(query, key, value, valid)
    key[:, 1], value[:, 1] = 1e6, -1e6
    np.testing.assert_array_equal(attend(query, key, value, valid), before)


def test_the_fused_kernel_is_refused_what_it_cannot_do():
    half = jnp.zeros((1, 3, 1, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        attend(*(half.astype(jnp.float32),) * 3, None, "cudnn")
    with pytest.raises(ValueError, match="mask"):
        attend(half, half, half, jnp.ones((1, 3), bool), "cudnn")
    with pytest.raises(ValueError, match="flash"):
        attend(half, half, half, None, "flash")


def test_half_precision_keeps_the_logits_and_their_softmax_in_float32():
    """Logits that share a large part: in bfloat16 their differences would be rounded away."""
    query, key, value = (
        jnp.asarray(_random(i, 1, 6, 1, 16)).astype(jnp.bfloat16) for i in range(3)
    )
    query, key = query.at[..., 0].set(32), key.at[..., 0].set(32)  # 256 in every logit
    exact = attend(*(x.astype(jnp.float32) for x in (query, key, value)), None)
    out = attend(query, key, value, None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.02)


def test_swiglu_gates_the_second_half_by_the_first():
    """down(silu(a) * b), [a, b] = up(x), 2/3 as wide as the MLP and a multiple of 8 (Shazeer 2020)."""
    x = _random(0, 3, 10)
    layer = FeedForward("swiglu")
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    assert params["up"]["kernel"].shape == (10, 2 * 32)  # 2/3 * 40 = 26.7
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1, params)
    gate, hidden = np.split(x @ params["up"]["kernel"] + params["up"]["bias"], 2, -1)
    hidden = gate / (1 + np.exp(-gate)) * hidden
    expected = hidden @ params["down"]["kernel"] + params["down"]["bias"]
    out = jax.jit(layer.apply)({"params": params}, x)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="geglu"):
        FeedForward("geglu").init(jax.random.key(0), x)


# ---- drop path ---------------------------------------------------------------------------------------


def test_every_block_keeps_the_same_number_of_rows_each_as_often():
    keys = jax.random.split(jax.random.key(0), 4000)
    kept = np.asarray(draw(keys, 2, 0.25, 4, 2))
    assert kept.shape == (2, 2, 1000, 6)  # round(8 * 0.75)
    assert (np.diff(kept, axis=-1) > 0).all()  # rising, so none twice
    each = kept.reshape(4, -1)
    for rows in each:
        np.testing.assert_allclose(np.bincount(rows, minlength=8) / 1000, 0.75, atol=0.06)
    assert all((each[i] != each[j]).any() for i in range(4) for j in range(i))


@pytest.mark.parametrize(("rate", "per_sample", "rows"), [(0.01, 1, 4), (0.3, 2, 6), (0.99, 1, 1)])
def test_at_least_one_row_of_a_block_is_kept(rate, per_sample, rows):
    keys = jax.random.split(jax.random.key(0), 8)
    kept = jax.eval_shape(lambda keys: drop_path_rows(keys, 1, rate, 4, per_sample), keys)
    assert kept.shape == (1, 2, 2, rows)


def test_without_drop_path_there_is_nothing_to_draw():
    keys = jax.random.split(jax.random.key(0), 8)
    assert drop_path_rows(keys, 2, 0.0, 4, 2) is None
    assert drop_path_rows(keys, 2, 0.3, 4, 0) is None  # no crops


def test_a_block_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="6 samples do not divide into logical blocks of 4"):
        drop_path_rows(jax.random.split(jax.random.key(0), 6), 2, 0.3, 4, 1)


def test_drop_path_depends_on_the_first_sample_of_a_block_not_on_its_place():
    keys = jax.random.split(jax.random.key(1), 12).reshape(3, 4)
    order = np.array([2, 0, 1])
    kept, moved = (draw(k.reshape(-1), 3, 0.4, 4, 2) for k in (keys, keys[order]))
    np.testing.assert_array_equal(moved, kept[:, :, order])
    others = draw(keys.at[:, 1:].set(keys[::-1, 1:]).reshape(-1), 3, 0.4, 4, 2)
    np.testing.assert_array_equal(others, kept)


def test_the_mean_over_draws_is_the_whole_branch():
    x = jnp.asarray(_random(4, 8, 3, 2))
    keys = jax.random.split(jax.random.key(0), (3000, 8))

    def once(keys):
        kept = drop_path_rows(keys, 1, 0.4, block=4, per_sample=1)[0, 0]
        return add_rows(x, kept, jnp.sin(take_rows(x, kept)))

    np.testing.assert_allclose(jax.jit(jax.vmap(once))(keys).mean(0), x + jnp.sin(x), atol=0.06)


def _block():
    """A block whose every branch does something, and 6 rows in two logical blocks of 3."""
    block = Block(heads=2, layer_scale=0.5)
    x = jnp.asarray(_random(4, 6, 5, 8))
    params = jax.jit(lambda k: block.init(k, x, None, None))(jax.random.key(0))
    return block, x, jax.tree.map(lambda p: np.asarray(p) + 0.3, params)


KEPT = np.array([[[0, 2], [1, 2]], [[1, 2], [0, 1]]])  # (branch, block, k)


@pytest.mark.parametrize("masked", [False, True])
def test_each_residual_branch_is_added_to_its_kept_rows_alone(masked):
    """Against a loop over rows, each alone with its own mask; the rest pass unchanged."""
    block, x, params = _block()
    valid = np.random.default_rng(0).random((6, 5)) < 0.6 if masked else None
    out = np.asarray(jax.jit(block.apply)(params, x, valid, KEPT))
    silent = {
        name: {"params": {**params["params"], f"scale_{name}": np.zeros(8, np.float32)}}
        for name in ("attention", "mlp")
    }
    alone = jax.jit(lambda p, y, seen: block.apply(p, y, seen, None))
    for row in range(6):
        y, seen = np.asarray(x[row : row + 1]), valid[row : row + 1] if masked else None
        for i, other in enumerate(("mlp", "attention")):
            if row % 3 in KEPT[i, row // 3]:
                y = y + 3 / 2 * (alone(silent[other], y, seen) - y)
        np.testing.assert_allclose(out[row], y[0], rtol=1e-4, atol=1e-4)
    once = KEPT[:, :, :1]
    out = jax.jit(block.apply)(params, x, valid, once)
    left = [r for r in range(6) if r % 3 not in once[:, r // 3]]
    np.testing.assert_array_equal(out[np.array(left)], x[np.array(left)])


def test_dropped_rows_cost_nothing():
    """Floating-point operations of a block, forward and backward, fall as the kept rows do."""
    block, x, params = _block()
    x = jnp.zeros((16, 32, 64))
    params = jax.eval_shape(lambda k: block.init(k, x, None, None), jax.random.key(0))

    def flops(kept):
        value = lambda p, x: block.apply(p, x, None, kept).sum()  # noqa: E731
        cost = jax.jit(jax.grad(value, (0, 1))).lower(params, x).cost_analysis()
        return cost["flops"]

    half = jnp.broadcast_to(jnp.arange(4), (2, 2, 4))  # 4 of 8 rows, twice
    assert 0.48 < flops(half) / flops(None) < 0.53


# ---- the stack ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack():
    model = Stack(depth=2, heads=2, layer_scale=0.5)
    long, short = jnp.asarray(_random(5, 4, 7, 8)), jnp.asarray(_random(6, 8, 3, 8))
    params = jax.jit(model.init)(jax.random.key(0), [(long, None, None)])
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1, params)
    keys = jax.random.split(jax.random.key(1), 4)
    kept = [draw(keys, 2, 0.5, 2, per_sample) for per_sample in (1, 2)]
    return params, [(long, None, kept[0]), (short, None, kept[1])]


def test_groups_pass_through_the_layers_as_each_would_alone(stack):
    params, groups = stack
    model = Stack(depth=2, heads=2, layer_scale=0.5)
    apply = jax.jit(model.apply)
    together = apply(params, groups)
    for group, out in zip(groups, together, strict=True):
        np.testing.assert_allclose(out, apply(params, [group])[0], rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(together[0] - groups[0][0])).max() > 1e-2


@pytest.fixture(scope="module")
def looped(stack):
    """Gradients through a plain loop over the layers."""
    params, groups = stack

    def value(params):
        total = 0.0
        for x, _, kept in groups:
            for i in range(2):
                layer = jax.tree.map(lambda p, i=i: p[i], params["params"]["layers"]["block"])
                x = Block(2, layer_scale=0.5).apply({"params": layer}, x, None, kept[i])
            total += (x**2).sum()
        return total

    return jax.jit(jax.grad(value))(params)


@pytest.mark.parametrize(("remat", "unroll"), [("none", 1), ("dots", 2), ("full", 1)])
def test_scanning_layers_and_computing_them_again_changes_no_gradient(stack, looped, remat, unroll):
    params, groups = stack
    model = Stack(depth=2, heads=2, layer_scale=0.5, remat=remat, unroll=unroll)
    slope = jax.jit(jax.grad(lambda p: sum((x**2).sum() for x in model.apply(p, groups))))(params)
    for got, want in zip(jax.tree.leaves(slope), jax.tree.leaves(looped), strict=True):
        assert np.isfinite(np.asarray(got)).all()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_what_is_computed_again_is_what_the_policy_says(stack):
    """A layer has four products with weights and two of attention, and twice as many backward."""
    params, groups = stack

    def products(remat):
        model = Stack(depth=2, heads=2, layer_scale=0.5, remat=remat)
        slope = jax.grad(lambda p: model.apply(p, groups[:1])[0].sum())
        return str(jax.make_jaxpr(slope)(params)).count("dot_general")

    none, dots, full = map(products, ("none", "dots", "full"))
    assert (none, dots, full) == (18, 18 + 2, 18 + 6)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="remat='some'; expected one of none, dots, full"):
        Stack(1, 1, remat="some").init(jax.random.key(0), [(jnp.zeros((1, 2, 4)), None, None)])


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pathme_jax.models.transformer import Stack, drop_path_rows

model = Stack(depth=2, heads=2, layer_scale=0.5)
x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 5, 8)), jnp.float32)
params = jax.jit(model.init)(jax.random.key(0), [(x, None, None)])
params = jax.tree.map(lambda p: np.asarray(p) + 0.1, params)
keys = jax.random.split(jax.random.key(1), 16)

def run(params, x, kept):
    return model.apply(params, [(x, None, kept)])[0]

def value(params, x, keys):
    return (run(params, x, drop_path_rows(keys, 2, 0.5, 2, 2)) ** 2).sum()

slope = jax.jit(jax.value_and_grad(value, (0, 1)))
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, P("data"))
one = slope(params, x, keys)
eight = slope(params, jax.device_put(x, split), jax.device_put(keys, split))
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())

kept = jax.device_put(drop_path_rows(keys, 2, 0.5, 2, 2), NamedSharding(mesh, P(None, None, "data")))
program = jax.jit(run).lower(params, jax.device_put(x, split), kept).compile().as_text()
for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert word not in program, word
print("same, and local")
"""


def test_kept_rows_stay_on_their_device_and_are_the_same_on_eight():
    """Two logical blocks a device: equal loss and gradients, and a forward pass without communication."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags}
    run = subprocess.run(
        [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.stdout.strip() == "same, and local", run.stderr[-2000:]


# ---- positions ---------------------------------------------------------------------------------------
