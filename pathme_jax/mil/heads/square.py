"""A bag as a square image in the order of its instances, under static shapes, and a convolution along a sequence.

The number of instances n is known only when the program runs, the padded size m when it is compiled. Everything
that depends on n is computed from the mask; arrays have the size that m instances would need.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import linen as nn
from jax import Array


def packed(mask: Array) -> tuple[Array, Array]:
    """(m,) mask → (m,) rows of the instances in their order, filled up with zeros; and how many they are, ≥ 1."""
    rows = jnp.flatnonzero(mask, size=len(mask), fill_value=0)
    return rows, jnp.maximum(mask.sum(), 1)


def side_of(count: Array) -> Array:
    """⌈√count⌉ of an int32 below 2^24, exact whatever the rounding of the device's square root."""
    side = jnp.round(jnp.sqrt(count.astype(jnp.float32))).astype(jnp.int32)
    return side + (side * side < count)


def largest_side(m: int) -> int:
    """⌈√m⌉: the side that `side_of` cannot exceed among m rows."""
    return math.isqrt(max(m, 1) - 1) + 1


class SequenceConv(nn.Module):
    """A depthwise convolution along the sequence with one kernel a head: (…, heads, t, w) → the same shape.

    The kernel of a head is shared by the head's w channels; zeros lie beyond both ends. No bias.
    """

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        heads = x.shape[-3]
        conv = nn.Conv(
            heads, (self.width,), feature_group_count=heads, use_bias=False, name="kernel"
        )
        return conv(x.swapaxes(-3, -1)).swapaxes(-3, -1)
