"""iBOT's masks: the counts of DINOv2's collate, the rectangles of BEiT's generator, keyed by sample."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.views.masks import ATTEMPTS, FAILURES, MaskPlan, _paint, draw, rows

PLAN = MaskPlan((16, 16))
drawn = jax.jit(draw, static_argnums=0)


def _keys(n: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


def test_counts_are_those_of_dinov2():
    """Half of 16 views, the i-th int(256 * linspace(0.1, 0.5, 9)[i + 1])."""
    assert PLAN.counts.tolist() == [38, 51, 64, 76, 89, 102, 115, 128] + [0] * 8
    assert PLAN.total == 663
    assert MaskPlan((4, 4), per_sample=1, block=4).counts.tolist() == [4, 8, 0, 0]
    assert MaskPlan((4, 4), block=1, share=1.0, ratio=(1.0, 1.0)).counts.tolist() == [16, 16]
    assert MaskPlan((4, 4), share=0.0).total == 0


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        MaskPlan((5, 9), block=4),
        MaskPlan((4, 4), per_sample=1, block=4),
        MaskPlan((2, 2), block=2, share=1.0, ratio=(0.0, 1.0)),
        MaskPlan((8, 8), share=0.0),
    ],
    ids=str,
)
def test_every_block_holds_its_counts_in_another_order_and_rows_find_them(plan):
    masks = np.asarray(drawn(plan, _keys(6 * plan.block)))
    assert masks.shape == (6 * plan.block, plan.per_sample, math.prod(plan.shape))
    blocks = masks.reshape(6, plan.block * plan.per_sample, -1)
    found = blocks.sum(-1)
    np.testing.assert_array_equal(np.sort(found, 1), np.tile(np.sort(plan.counts), (6, 1)))
    if len(set(plan.counts)) > 1:
        assert len({tuple(counts) for counts in found}) > 1
    at = np.asarray(jax.jit(rows, static_argnums=0)(plan, masks))
    assert at.dtype == np.int32 and at.shape == (6, plan.total)
    for block, positions in zip(blocks, at, strict=True):
        np.testing.assert_array_equal(positions, np.flatnonzero(block))


def test_which_view_is_masked_is_fair():
    """Each of the 16 places gets each count about as often as another."""
    found = np.asarray(drawn(PLAN, _keys(400))).reshape(50, 16, -1).sum(-1)
    assert np.abs((found > 0).mean(0) - 0.5).max() < 0.25  # 3.5 standard errors
    assert np.abs(found.mean(0) - PLAN.total / 16).max() < 25


def _painted(uniform, order, count, plan):
    """BEiT's generator as DINOv2 uses it, in loops, from given draws."""
    height, width = plan.shape
    mask, failures = np.zeros(plan.shape, bool), 0
    for area, bend, down, right in uniform:
        left_over = count - mask.sum()
        if failures == FAILURES or left_over == 0:
            break
        failures += 1
        area = np.float32(plan.least) + area * np.float32(left_over - plan.least)
        aspect = np.exp((2 * bend - 1) * np.float32(-math.log(plan.aspect)))
        h, w = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if h > height or w > width:
            continue
        top, left = int(down * (height - h + 1)), int(right * (width - w + 1))
        new = h * w - mask[top : top + h, left : left + w].sum()
        if 0 < new <= left_over:
            mask[top : top + h, left : left + w] = True
            failures = 0
    mask = mask.reshape(-1)
    free = np.flatnonzero(~mask)
    mask[free[np.argsort(order[free])][: count - mask.sum()]] = True
    return mask


@pytest.mark.parametrize("plan", [PLAN, MaskPlan((5, 9)), MaskPlan((4, 4))], ids=str)
def test_masks_are_painted_as_the_published_generator_paints_them(plan):
    rng, n, cells = np.random.default_rng(1), 60, math.prod(plan.shape)
    uniform = rng.random((n, ATTEMPTS, 4), np.float32)
    order = rng.random((n, cells), np.float32)
    counts = np.resize([0, 1, cells // 10, cells // 3, cells // 2, cells], n)
    ours = jax.jit(jax.vmap(partial(_paint, plan=plan)))(uniform, order, jnp.asarray(counts))
    theirs = [_painted(u, o, c, plan) for u, o, c in zip(uniform, order, counts, strict=True)]
    np.testing.assert_array_equal(ours, theirs)


def _neighbours(masks: np.ndarray) -> float:
    """Of neighbouring tokens with one masked, the share where both are."""
    across = (masks[:, :, 1:], masks[:, :, :-1]), (masks[:, 1:], masks[:, :-1])
    both = sum((a & b).sum() for a, b in across)
    return both / sum((a | b).sum() for a, b in across)


def test_masks_are_blocks_and_cover_the_grid():
    masks = np.asarray(drawn(PLAN, _keys(400))).reshape(-1, 256)
    grid = masks.reshape(-1, 16, 16)
    random = np.random.default_rng(0).permuted(masks, axis=1).reshape(grid.shape)
    assert _neighbours(grid) > 0.65 and _neighbours(random) < 0.3
    often = grid.mean(0)
    np.testing.assert_allclose(often.mean(), PLAN.total / 16 / 256, rtol=1e-6)
    # rectangles that must fit are rare in the corners, as in the published generator
    assert 0.05 * often.mean() < often.min() and often.max() < 2 * often.mean()
    # turned by a quarter, the masks are as likely: no side of the grid is preferred
    assert np.abs(often - often.T).mean() < 0.1 * often.mean()


def test_blocks_know_nothing_of_each_other():
    """The same whatever else is in the batch, so that devices, and batches, may divide them anyhow."""
    keys = _keys(400)
    whole = np.asarray(drawn(PLAN, keys))
    for at in (0, 8, 392):
        np.testing.assert_array_equal(drawn(PLAN, keys[at : at + 8]), whole[at : at + 8])


def test_a_samples_rectangles_come_from_its_own_key():
    """Where two samples of a block swap places and counts are all alike, so do their masks."""
    plan = MaskPlan((8, 8), share=1.0, ratio=(0.4, 0.4))
    keys, order = _keys(8), np.array([0, 3, 2, 1, 7, 5, 6, 4])
    masks = np.asarray(drawn(plan, keys))
    np.testing.assert_array_equal(drawn(plan, keys[order]), masks[order])
    views = masks.reshape(16, -1)
    assert len(np.unique(views, axis=0)) == 16  # and no two views are the same


def test_a_batch_that_cuts_a_block_is_refused():
    with pytest.raises(UserError, match=r"12 samples .* blocks of 8"):
        draw(PLAN, _keys(12))


@pytest.mark.parametrize("wrong", [{"ratio": (0.5, 0.1)}, {"ratio": (0.1, 50.0)}, {"share": 50}])
def test_impossible_shares_are_refused(wrong):
    with pytest.raises(UserError, match="ratio"):
        MaskPlan((8, 8), **wrong)
