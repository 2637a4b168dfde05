"""The region encoder and HMSA: which token may see which, and in what order they come out.

Perturbations rather than shapes: a wrong reshape keeps every shape (METHODS 2.1, defects 3, 4, 7, 8).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.models.region import HMSA, RegionEncoder, child_mask, children_of
from pathme_jax.models.resample import resize_positions
from pathme_jax.models.transformer import Block

WIDTH, PROMPTS, DEPTH = 12, 3, 2


def _random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _changed(before, after, tolerance: float = 1e-6) -> list[int]:
    """Tokens, along axis 1, that differ anywhere."""
    return np.flatnonzero(
        np.abs(np.asarray(after) - np.asarray(before)).max((0, 2)) > tolerance
    ).tolist()


def _louder(params):
    """Weights far from their small start, so that no path is lost in rounding."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(5)
    return jax.tree.unflatten(
        tree, [x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    )


# ---- children ----------------------------------------------------------------------------------------


def test_children_are_the_four_by_four_block_below_their_parent():
    mask = np.asarray(child_mask())
    for parent in range(16):
        row, column = divmod(parent, 4)
        brute = [
            r * 16 + c
            for r in range(256 // 16)
            for c in range(16)
            if (r // 4, c // 4) == (row, column)
        ]
        assert np.flatnonzero(mask[parent]).tolist() == brute
    assert (mask.sum(0) == 1).all()  # every 20x tile has one parent


def test_children_of_keeps_raster_order_and_trailing_axes():
    fine = np.random.default_rng(0).normal(size=(2, 16, 16, 5)).astype(np.float32)
    grouped = np.asarray(children_of(jnp.asarray(fine)))
    for parent in range(16):
        r, c = 4 * (parent // 4), 4 * (parent % 4)
        np.testing.assert_array_equal(
            grouped[:, parent], fine[:, r : r + 4, c : c + 4].reshape(2, 16, 5)
        )


# ---- the encoder -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    model = RegionEncoder(width=WIDTH, depth=DEPTH, heads=2, layer_scale=1.0, prompts=PROMPTS)
    grid = _random(1, 2, 4, 4, 7)
    valid = jnp.ones((2, 4, 4), bool)
    params = jax.jit(lambda k: model.init(k, grid, valid, method="coarse"))(jax.random.key(0))
    params = _louder(params)
    coarse = jax.jit(lambda p, g, v, m=None: model.apply(p, g, v, m, method="coarse"))
    fine = jax.jit(lambda p, g, v, m=None: model.apply(p, g, v, m, method="fine"))

    def slope(p, v, scale):
        return jax.grad(lambda p: (model.apply(p, grid, v, method=scale)["tokens"] ** 3).sum())(p)

    slopes = {scale: jax.jit(functools.partial(slope, scale=scale)) for scale in ("coarse", "fine")}
    return coarse, fine, params, grid, valid, slopes


def test_only_the_coarse_scale_has_prompts_and_both_share_every_other_weight(encoder):
    coarse, fine, params, grid, valid, slopes = encoder
    assert coarse(params, grid, valid)["prompts"].shape == (2, PROMPTS, WIDTH)
    assert "prompts" not in fine(params, grid, valid)

    def reached(scale):
        slope = slopes[scale](params, valid)["params"]
        return {k for k, v in slope.items() if any(np.abs(x).max() > 0 for x in jax.tree.leaves(v))}

    assert reached("coarse") - reached("fine") == {"prompts"}
    assert reached("fine") == set(params["params"]) - {"prompts", "mask_token"}


def test_prompts_are_fresh_before_every_block_and_the_old_ones_dropped(encoder):
    """A NumPy loop over the blocks, with prompts put between CLS and tokens, gives the same."""
    coarse, _, params, grid, valid, _ = encoder
    p = params["params"]
    x = jax.nn.gelu(grid @ p["embed"]["kernel"] + p["embed"]["bias"], approximate=False)
    tokens = (x + resize_positions(p["positions"], (4, 4))).reshape(2, 16, WIDTH)
    cls = jnp.broadcast_to(p["cls_token"], (2, 1, WIDTH))
    for i in range(DEPTH):
        fresh = jnp.broadcast_to(p["prompts"][i], (2, PROMPTS, WIDTH))
        sequence = jnp.concatenate([cls, fresh, tokens], 1)
        block = Block(2, layer_scale=1.0)
        layer = jax.tree.map(lambda x, i=i: x[i], p["blocks"]["layers"]["block"])
        sequence = block.apply({"params": layer}, sequence, None, None)
        cls, prompts, tokens = (
            sequence[:, :1],
            sequence[:, 1 : 1 + PROMPTS],
            sequence[:, 1 + PROMPTS :],
        )
    out = coarse(params, grid, valid)
    np.testing.assert_allclose(out["pre_norm"], tokens, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out["prompts"], prompts, rtol=1e-4, atol=1e-4)
    norm = lambda y: (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)  # noqa: E731
    expected = norm(np.asarray(cls[:, 0])) * p["norm"]["scale"] + p["norm"]["bias"]
    np.testing.assert_allclose(out["cls"], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0, 1])
def test_the_content_of_an_invalid_tile_changes_no_valid_token(encoder, scale):
    apply, params, grid, valid = encoder[scale], *encoder[2:5]
    valid = valid.at[:, 1, 2].set(False)
    before = apply(params, grid, valid)
    after = apply(params, grid.at[:, 1, 2].set(1e6), valid)
    np.testing.assert_array_equal(after["cls"], before["cls"])
    assert set(_changed(before["tokens"], after["tokens"], 0)) <= {1 * 4 + 2}
    assert np.isfinite(np.asarray(after["tokens"])).all()


def test_a_region_without_tissue_stays_finite(encoder):
    coarse, _, params, grid, valid, slopes = encoder
    nothing = jnp.zeros_like(valid)
    out, slope = coarse(params, grid, nothing), slopes["coarse"](params, nothing)
    assert all(np.isfinite(np.asarray(x)).all() for x in out.values())
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(slope))


def test_a_mask_hides_content_but_not_position(encoder):
    coarse, _, params, grid, valid, _ = encoder
    mask = jnp.zeros((2, 4, 4), bool).at[:, 0, 1].set(True)
    before = coarse(params, grid, valid, mask)
    after = coarse(params, grid.at[:, 0, 1].set(9.0), valid, mask)
    np.testing.assert_array_equal(after["tokens"], before["tokens"])
    elsewhere = coarse(params, grid, valid, jnp.roll(mask, 1, 2))
    assert len(_changed(before["tokens"], elsewhere["tokens"])) == 16


def test_crops_of_any_size_pass_through(encoder):
    _, fine, params, grid, _, _ = encoder
    for side in (3, 4):
        out = fine(params, grid[:, :side, :side], jnp.ones((2, side, side), bool))
        assert out["tokens"].shape == (2, side * side, WIDTH)


# ---- HMSA --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hmsa():
    """Two local and no global layer, and one local and one global."""
    arrays = (_random(2, 2, 16, WIDTH), _random(3, 2, PROMPTS, WIDTH), _random(4, 2, 256, WIDTH))
    valid = jnp.ones((2, 256), bool)
    made = {}
    for name, layers in (("local", (2, 0)), ("global", (1, 1))):
        model = HMSA(*layers, heads=2)
        params = _louder(jax.jit(model.init)(jax.random.key(0), *arrays, valid))
        made[name] = jax.jit(lambda *a, m=model, p=params: m.apply(p, *a))
    return made, arrays, valid


@pytest.mark.parametrize("cell", [(0, 0), (5, 2), (9, 14), (15, 15)])
def test_in_local_layers_a_tile_reaches_its_own_parent_and_the_prompts_only(hmsa, cell):
    """Through two layers, so that a scrambled order after the first would show (defect 8)."""
    made, (coarse, prompts, fine), valid = hmsa
    before = made["local"](coarse, prompts, fine, valid)
    at = cell[0] * 16 + cell[1]
    after = made["local"](coarse, prompts, fine.at[:, at].set(-3.0), valid)
    parent = cell[0] // 4 * 4 + cell[1] // 4
    assert _changed(before, after) == [parent, *range(16, 16 + PROMPTS)]


def test_in_global_layers_a_tile_reaches_every_token(hmsa):
    made, (coarse, prompts, fine), valid = hmsa
    before = made["global"](coarse, prompts, fine, valid)
    after = made["global"](coarse, prompts, fine.at[:, 100].set(-3.0), valid)
    assert _changed(before, after) == list(range(16 + PROMPTS))


@pytest.mark.parametrize("depth", ["local", "global"])
def test_tokens_keep_their_place_coarse_first_then_prompts(hmsa, depth):
    """Queries never mix with one another: a changed query comes out at its own place, alone."""
    made, (coarse, prompts, fine), valid = hmsa
    before = made[depth](coarse, prompts, fine, valid)
    for i in (0, 7, 15):
        assert _changed(before, made[depth](coarse.at[:, i].add(1.0), prompts, fine, valid)) == [i]
    after = made[depth](coarse, prompts.at[:, 1].add(1.0), fine, valid)
    assert _changed(before, after) == [16 + 1]


def test_an_invalid_tile_is_attended_to_by_none(hmsa):
    made, (coarse, prompts, fine), valid = hmsa
    valid = valid.at[:, 37].set(False)
    for apply in made.values():
        before = apply(coarse, prompts, fine, valid)
        np.testing.assert_array_equal(
            before, apply(coarse, prompts, fine.at[:, 37].set(1e6), valid)
        )


def test_a_parent_without_children_and_a_region_without_tissue_stay_finite(hmsa):
    made, (coarse, prompts, fine), valid = hmsa
    orphan = valid & ~child_mask()[5]
    for apply in made.values():
        slope = jax.jit(jax.grad(lambda c, f, s, a=apply: (a(c, prompts, f, s) ** 3).sum(), (0, 1)))
        for seen in (orphan, valid & False):
            assert np.isfinite(np.asarray(apply(coarse, prompts, fine, seen))).all()
            assert all(np.isfinite(np.asarray(s)).all() for s in slope(coarse, fine, seen))


def test_one_hmsa_layer_against_numpy():
    """W on the 20x side, L2-normalise both, multi-head attention, residual, LayerNorm."""
    model = HMSA(local_layers=1, global_layers=0, heads=2)
    coarse, prompts, fine = _random(6, 1, 16, 4), _random(7, 1, 1, 4), _random(8, 1, 256, 4)
    valid = np.random.default_rng(9).random((1, 256)) < 0.7
    params = _louder(model.init(jax.random.key(0), coarse, prompts, fine, jnp.asarray(valid)))
    out = np.asarray(model.apply(params, coarse, prompts, fine, jnp.asarray(valid)))[0]
    p = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["params"]["layers"])
    dense = lambda x, name: x @ p[name]["kernel"] + p[name]["bias"]  # noqa: E731
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    query = np.concatenate([coarse[0], prompts[0]]).astype(np.float64)
    tiles = unit(dense(np.asarray(fine[0], np.float64), "fine"))
    q, k, v = dense(unit(query), "query"), dense(tiles, "key"), dense(tiles, "value")
    for i in range(17):
        at = [
            j
            for j in range(256)
            if valid[0, j] and (i == 16 or (j // 16 // 4, j % 16 // 4) == divmod(i, 4))
        ]
        mixed = []
        for h in (slice(0, 2), slice(2, 4)):
            logit = k[at, h] @ q[i, h] / np.sqrt(2)
            weight = np.exp(logit - logit.max())
            mixed.append(weight / weight.sum() @ v[at, h])
        y = query[i] + dense(np.concatenate(mixed), "out")
        y = (y - y.mean()) / np.sqrt(y.var() + 1e-6)
        np.testing.assert_allclose(out[i], y * p["norm"]["scale"] + p["norm"]["bias"], atol=1e-4)


def test_dropout_is_keyed_by_sample_and_only_with_keys():
    model = HMSA(local_layers=1, global_layers=1, heads=2, dropout=0.5)
    arrays = (_random(2, 2, 16, WIDTH), _random(3, 2, PROMPTS, WIDTH), _random(4, 2, 256, WIDTH))
    valid = jnp.ones((2, 256), bool)
    params = jax.jit(model.init)(jax.random.key(0), *arrays, valid)
    apply = jax.jit(lambda a, v, k: model.apply(params, *a, v, k))
    keys = jax.random.split(jax.random.key(1), 2)
    out = apply(arrays, valid, keys)
    swapped = apply(tuple(a[::-1] for a in arrays), valid, keys[::-1])
    np.testing.assert_allclose(swapped[::-1], out, atol=1e-6)
    assert np.abs(np.asarray(out - model.apply(params, *arrays, valid))).max() > 1e-3
