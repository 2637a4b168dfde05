"""A bag as a square image in the order of its instances, under static shapes, and a convolution along a sequence.

The number of instances n is known only when the program runs, the padded size m when it is compiled. Everything
that depends on n is computed from the mask; arrays have the size that m instances would need.
"""

from __future__ import annotations

import math

import jax
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


def depthwise(image: Array, kernel: Array) -> Array:
    """Convolution of each channel with its own kernel: (h, w, …) by (k, n, …) → (h, w, …), zeros beyond the edges.

    A sum of shifted images. The gradient of XLA's own depthwise convolution takes 30 times as long on a CPU.
    """
    (h, w), (k, n) = image.shape[:2], kernel.shape[:2]
    around = [((size - 1) // 2, size // 2) for size in (k, n)]
    padded = jnp.pad(image, around + [(0, 0)] * (image.ndim - 2))

    @jax.checkpoint  # or each row's share of the image would be kept for the gradient
    def add(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        first, taps = row
        rows = jax.lax.dynamic_slice_in_dim(padded, first, h)
        return total + sum(taps[j] * rows[:, j : j + w] for j in range(n)), None

    return jax.lax.scan(add, jnp.zeros_like(image), (jnp.arange(k), kernel))[0]


class SequenceConv(nn.Module):
    """A depthwise convolution along the sequence with one kernel a head: (…, heads, t, w) → the same shape.

    The kernel of a head is shared by the head's w channels; zeros lie beyond both ends. No bias.
    """

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.width, 1, x.shape[-3])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        column = jnp.moveaxis(x, -2, 0)[:, None]  # (t, 1, …, heads, w)
        return jnp.moveaxis(depthwise(column, kernel[..., None])[:, 0], 0, -2)
