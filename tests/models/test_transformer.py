"""Attention, stochastic depth and position interpolation, as every encoder uses them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.models.transformer import Block, attend, drop_path_factors, resize_positions


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


def test_drop_path_keeps_with_the_right_odds_and_scale():
    keys = jax.random.split(jax.random.key(0), 2000)
    factors = np.asarray(drop_path_factors(keys, 2, 0.25))
    assert factors.shape == (2, 2, 2000)
    np.testing.assert_allclose(np.unique(factors), [0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose((factors == 0).mean((2,)), 0.25, atol=0.04)
    np.testing.assert_allclose(factors.mean(), 1, atol=0.02)  # so that expectations are unchanged
    assert drop_path_factors(keys, 2, 0.0) is None


def test_drop_path_depends_on_the_sample_not_on_its_slot():
    keys = jax.random.split(jax.random.key(1), 8)
    order = np.array([3, 1, 0, 7, 6, 2, 5, 4])
    np.testing.assert_array_equal(
        drop_path_factors(keys[order], 3, 0.4), drop_path_factors(keys, 3, 0.4)[..., order]
    )


def test_drop_path_scales_each_residual_branch_of_each_sample():
    block = Block(heads=2, layer_scale=0.5)
    x = jnp.asarray(_random(4, 3, 5, 8))
    params = jax.jit(lambda k: block.init(k, x, None, None))(jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.3, params)  # so that every branch does something
    keep = jnp.array([[0.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    out = block.apply(params, x, None, keep)
    np.testing.assert_array_equal(out[0], x[0])  # both branches dropped
    whole = block.apply(params, x, None, None)
    np.testing.assert_allclose(out[2], whole[2], rtol=1e-5)
    attention_only = block.apply(params, x, None, jnp.array([[1.0] * 3, [0.0] * 3]))
    np.testing.assert_allclose(out[1] - x[1], 2 * (attention_only[1] - x[1]), rtol=1e-4, atol=1e-4)


def test_positions_keep_their_values_at_their_own_size_and_constants_at_any():
    grid = jnp.asarray(_random(5, 16, 16, 3))
    assert resize_positions(grid, (16, 16)) is grid
    for side in (3, 4, 6):
        flat = resize_positions(jnp.full((16, 16, 2), 0.7), (side, side))
        np.testing.assert_allclose(flat, np.full((side, side, 2), 0.7), rtol=1e-5)


def test_positions_are_interpolated_along_their_own_axes():
    """A ramp over rows stays a rising ramp over rows, constant over columns: no transposition."""
    ramp = jnp.broadcast_to(jnp.arange(16.0)[:, None, None], (16, 16, 1))
    out = np.asarray(resize_positions(ramp, (4, 4)))[..., 0]
    np.testing.assert_allclose(out, np.repeat(out[:, :1], 4, 1), atol=1e-4)
    # rows 0-3, 4-7, … have means 1.5, 5.5, 9.5, 13.5
    np.testing.assert_allclose(out[:, 0], [1.5, 5.5, 9.5, 13.5], atol=0.6)
    wider = np.asarray(resize_positions(ramp, (32, 32)))[:, 0, 0]
    np.testing.assert_allclose(wider[4:-4], (np.arange(32)[4:-4] + 0.5) / 2 - 0.5, atol=1e-3)
