"""iBOT's masks: exact counts, one block, keyed by sample."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pathme_jax.views.masks import block_masks, mask_counts


def _keys(n: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (16, 16), (5, 9)])
def test_every_sample_has_exactly_its_count(shape):
    tokens = shape[0] * shape[1]
    counts = np.resize([0, 1, 2, tokens // 10, tokens // 3, tokens // 2, tokens], 70)
    masks = np.asarray(jax.jit(block_masks, static_argnums=2)(_keys(70), counts, shape))
    assert masks.sum((1, 2)).tolist() == counts.tolist()


def test_a_mask_lies_inside_a_rectangle_hardly_larger_than_itself():
    """Block-wise: its bounding box holds `count` tokens and less than one more row or column of them,
    though the ratio of sides varies and the grid's edge is near."""
    counts = np.resize([26, 64, 128], 300)
    masks = np.asarray(jax.jit(block_masks, static_argnums=2)(_keys(300), counts, (16, 16)))
    ratios = []
    for mask, count in zip(masks, counts, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert count <= height * width < count + height + width
        ratios.append(height / width)
    assert min(ratios) < 0.5 and max(ratios) > 2


def test_masks_reach_every_token():
    masks = np.asarray(jax.jit(block_masks, static_argnums=2)(_keys(400), np.full(400, 6), (8, 8)))
    often = masks.mean(0)
    assert often.min() > 0 and often.max() < 0.4


def test_a_mask_belongs_to_the_key_not_to_the_slot():
    counts, order = np.resize([3, 9, 14, 30], 12), np.random.default_rng(0).permutation(12)
    make = jax.jit(block_masks, static_argnums=2)
    keys = _keys(12)
    np.testing.assert_array_equal(
        make(keys[order], counts[order], (8, 8)), np.asarray(make(keys, counts, (8, 8)))[order]
    )
    assert (np.asarray(make(keys, counts, (8, 8))) != make(_keys(12, 1), counts, (8, 8))).any()


def test_counts_are_half_masked_with_ratios_from_a_tenth_to_a_half():
    counts = mask_counts(16, 256, (0.1, 0.5), 0.5, 8)
    assert counts[:8].tolist() == [26, 60, 94, 128, 0, 0, 0, 0]  # 256 * linspace(0.1, 0.5, 4)
    assert counts[8:].tolist() == counts[:8].tolist()


def test_counts_depend_on_the_place_in_the_global_batch_only():
    """However many samples follow, the first have the same counts: blocks are logical, not devices."""
    whole = mask_counts(40, 64, (0.1, 0.5), 0.5, 8)
    assert mask_counts(24, 64, (0.1, 0.5), 0.5, 8).tolist() == whole[:24].tolist()
    assert mask_counts(3, 64, (0.1, 0.5), 0.5, 8).tolist() == whole[:3].tolist()
