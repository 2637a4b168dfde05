"""iBOT's block-wise masks with constant counts, so that shapes stay static on any number of devices.

A logical block is `block` consecutive samples of the global batch. Every block masks the same number of
tokens, whatever the keys; only which view gets which of the block's counts, and where, is random.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.errors import UserError

Array = jax.Array

ATTEMPTS = 40  # rectangles tried for a mask; hardly any mask of DINOv2's counts needs more
FAILURES = 10  # so many refused in a row end the painting, as in BEiT


@dataclasses.dataclass(frozen=True)
class MaskPlan:
    """How many tokens are masked, and in what rectangles.

    Attributes:
        shape: tokens (rows, columns).
        per_sample: views of a sample that may be masked: the global crops.
        block: samples in a logical block; the batch must be a multiple of it.
        ratio: masked share of the least and of the most masked view, DINOv2's (0.1, 0.5).
        share: share of the views that are masked at all.
        aspect: a rectangle's height / width lies in [aspect, 1 / aspect].
        least: smallest rectangle, in tokens.

    Raises:
        UserError: `ratio` or `share` does not lie in [0, 1].
    """

    shape: tuple[int, int]
    per_sample: int = 2
    block: int = 8
    ratio: tuple[float, float] = (0.1, 0.5)
    share: float = 0.5
    aspect: float = 0.3
    least: int = 4

    def __post_init__(self) -> None:
        if not (0 <= self.ratio[0] <= self.ratio[1] <= 1 and 0 <= self.share <= 1):
            raise UserError(
                f"masks of ratio {self.ratio} over a share of {self.share}",
                "Expected 0 <= ratio[0] <= ratio[1] <= 1 and 0 <= share <= 1",
            )

    @property
    def counts(self) -> np.ndarray:
        """(block * per_sample,) int: masked tokens of each view of a block, before the shuffle.

        Of m = round(share * views) masked views the i-th has floor(n * linspace(*ratio, m + 1)[i + 1])
        tokens, as DINOv2 cuts the range of ratios into m equal parts; the others have 0.
        """
        views = self.block * self.per_sample
        masked = round(self.share * views)
        counts = np.zeros(views, np.int32)
        counts[:masked] = math.prod(self.shape) * np.linspace(*self.ratio, masked + 1)[1:]
        return counts

    @property
    def total(self) -> int:
        """Masked tokens of a block."""
        return int(self.counts.sum())


def draw(plan: MaskPlan, keys: Array) -> Array:
    """Masks of a batch: (b,) sample keys to (b, per_sample, rows * columns) bool, True = masked.

    The first key of a block deals out the block's counts; a view's rectangles come from its own
    sample's key. Every block holds exactly `plan.total` masked tokens.

    Raises:
        UserError: b is not a multiple of plan.block.
    """
    if len(keys) % plan.block:
        raise UserError(
            f"a batch of {len(keys)} samples does not divide into mask blocks of {plan.block}",
            "Make config.batch.samples a multiple of the block",
        )

    def deal(first: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(first, plan.per_sample), plan.counts)

    def mask(key: Array, view: Array, count: Array) -> Array:
        uniform = jax.random.uniform(jax.random.fold_in(key, view), (4 * ATTEMPTS + cells,))
        rectangles, order = jnp.split(uniform, [4 * ATTEMPTS])
        return _paint(rectangles.reshape(-1, 4), order, count, plan)

    cells = math.prod(plan.shape)
    counts = jax.vmap(deal)(keys.reshape(-1, plan.block)[:, 0]).reshape(-1, plan.per_sample)
    one_sample = jax.vmap(mask, (None, 0, 0))
    return jax.vmap(one_sample, (0, None, 0))(keys, jnp.arange(plan.per_sample), counts)


def rows(plan: MaskPlan, mask: Array) -> Array:
    """Where the masked tokens of a block lie: (b, per_sample, n) bool to (b // block, total) int32.

    Positions are among the block's block * per_sample * n tokens, ascending. A sort along one axis, and
    not a nonzero of the whole batch, so that every device finds its own blocks' without asking others.
    """
    flat = mask.reshape(-1, plan.block * plan.per_sample * mask.shape[-1])
    return jnp.argsort(~flat, axis=1, stable=True)[:, : plan.total].astype(jnp.int32)


def _paint(rectangles: Array, order: Array, count: Array, plan: MaskPlan) -> Array:
    """One mask of exactly `count` tokens, (n,) bool, from uniform draws in [0, 1).

    `rectangles` (attempts, 4) are tried one after another: area between `least` and the tokens still
    wanted, log-uniform aspect, top, left. One is painted if it fits the grid and newly covers between
    one and all of the tokens still wanted. `order` (n,) says which tokens complete the mask.
    """
    height, width = plan.shape
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    stretch = -math.log(plan.aspect)

    def attempt(state: tuple[Array, Array], uniform: Array) -> tuple[tuple[Array, Array], None]:
        mask, failures = state
        wanted = count - mask.sum()
        area = plan.least + uniform[0] * (wanted - plan.least)
        aspect = jnp.exp((2 * uniform[1] - 1) * stretch)
        h, w = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
        top = jnp.floor(uniform[2] * (height - h + 1))
        left = jnp.floor(uniform[3] * (width - w + 1))
        inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
        new = (inside & ~mask).sum()
        good = (h <= height) & (w <= width) & (new > 0) & (new <= wanted) & (failures < FAILURES)
        return (mask | (inside & good), jnp.where(good, 0, failures + 1)), None

    start = (jnp.zeros(plan.shape, bool), jnp.zeros((), jnp.int32))
    (mask, _), _ = jax.lax.scan(attempt, start, rectangles)
    rank = jnp.argsort(jnp.argsort(order - 2.0 * mask.reshape(-1)))
    return rank < count
