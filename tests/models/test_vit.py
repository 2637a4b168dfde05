"""The patch encoder: what its tokens are, and what they may depend on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.models.vit import ViT


@pytest.fixture(scope="module")
def vit():
    model = ViT(patch=4, width=12, depth=2, heads=3, layer_scale=1.0, registers=2, grid=4)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 16, 3)), jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)
    return jax.jit(lambda p, x, mask=None: model.apply(p, x, mask)), params, images


def test_one_cls_token_and_one_token_a_patch_without_the_registers(vit):
    apply, params, images = vit
    out = apply(params, images)
    assert out["cls"].shape == (3, 12) and out["tokens"].shape == (3, 16, 12)


def test_a_smaller_image_interpolates_the_positions(vit):
    apply, params, images = vit
    assert apply(params, images[:, :8, :8])["tokens"].shape == (3, 4, 12)


def test_tokens_are_in_raster_order_of_their_patches(vit):
    """With attention and MLP silenced, a token shows its own patch: row-major, no transposition."""
    apply, params, images = vit
    silent = jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.zeros_like(p) if "scale_" in str(path[-1]) else p, params
    )
    before = np.asarray(apply(silent, images)["tokens"])
    changed = images.at[:, 4:8, 8:12].add(1.0)  # patch row 1, column 2
    moved = np.abs(np.asarray(apply(silent, changed)["tokens"]) - before).max((0, 2))
    assert np.flatnonzero(moved > 1e-6).tolist() == [1 * 4 + 2]


def test_a_masked_patch_hides_its_content_from_every_token(vit):
    apply, params, images = vit
    mask = jnp.zeros((3, 16), bool).at[:, 6].set(True)
    before = apply(params, images, mask)
    after = apply(params, images.at[:, 4:8, 8:12].set(9.0), mask)
    np.testing.assert_array_equal(after["cls"], before["cls"])
    np.testing.assert_array_equal(after["tokens"], before["tokens"])
    assert np.abs(np.asarray(before["cls"] - apply(params, images)["cls"])).max() > 1e-6


def test_a_sample_is_encoded_alike_in_every_slot_of_the_batch(vit):
    apply, params, images = vit
    order = jnp.array([2, 0, 1])
    out, other = apply(params, images), apply(params, images[order])
    np.testing.assert_allclose(other["cls"], out["cls"][order], atol=1e-6)
    np.testing.assert_allclose(other["tokens"], out["tokens"][order], atol=1e-6)


def test_several_sizes_at_once_give_what_each_gives_alone(vit):
    apply, params, images = vit
    model = ViT(patch=4, width=12, depth=2, heads=3, layer_scale=1.0, registers=2, grid=4)
    mask = jnp.zeros((3, 16), bool).at[:, 6].set(True)
    small = images[:2, :8, :12]
    groups = [(images, mask, None), (small, None, None)]
    out = jax.jit(lambda p, groups: model.apply(p, groups, method="groups"))(params, groups)
    for got, want in zip(out, (apply(params, images, mask), apply(params, small)), strict=True):
        np.testing.assert_allclose(got["cls"], want["cls"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got["tokens"], want["tokens"], rtol=1e-5, atol=1e-5)


def test_half_precision_is_of_the_computation_not_of_the_parameters(vit):
    apply, params, images = vit
    model = ViT(
        patch=4, width=12, depth=2, heads=3, layer_scale=1.0, registers=2, grid=4, dtype="bfloat16"
    )
    fresh = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    out = jax.jit(model.apply)(params, images)["tokens"]
    assert out.dtype == jnp.bfloat16
    gap = np.asarray(out.astype(jnp.float32) - apply(params, images)["tokens"])
    assert 1e-4 < np.abs(gap).max() < 0.1
