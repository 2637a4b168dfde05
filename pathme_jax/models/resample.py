"""Interpolation as PyTorch and PIL do it, as one matrix an axis.

Released encoders were trained with these exact rules; features move by per cents where another is used.
`jax.image.resize` has the antialiased two, but not PyTorch's bicubic kernel without antialiasing.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# kernel, its a, antialias, offset. Keys' cubic has a = -1/2 in PIL and in PyTorch's antialiased form, else
# -3/4. DINOv2 without registers asks PyTorch for a scale of (new + 0.1) / old, which moves every sample.
RULES = {
    "bicubic antialias": ("cubic", -0.5, True, 0.0),
    "bilinear antialias": ("linear", 0.0, True, 0.0),
    "bicubic": ("cubic", -0.75, False, 0.0),
    "bicubic offset": ("cubic", -0.75, False, 0.1),
}


@functools.lru_cache(maxsize=256)
def matrix(old: int, new: int, rule: str) -> np.ndarray:
    """(new, old) float32 weights that resample a line of `old` values to `new`; rows sum to 1.

    Sample i lies at (i + 1/2) old / (new + offset) - 1/2. Antialiasing widens the kernel by old / new when
    shrinking, and leaves out what lies beyond the border; without it the border value is repeated.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"resample={rule!r}; expected one of {', '.join(RULES)}")
    kernel, a, antialias, offset = RULES[rule]
    widen = max(old / new, 1.0) if antialias else 1.0
    centre = (np.arange(new) + 0.5) * (old / (new + offset)) - 0.5
    reach = 2 * widen + 1
    taps = np.arange(-int(reach) - 1, int(reach) + 2) + np.floor(centre).astype(int)[:, None]
    x = np.abs(taps - centre[:, None]) / widen
    if kernel == "linear":
        weight = np.maximum(1 - x, 0)
    else:
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0))
    inside = (taps >= 0) & (taps < old)
    if antialias:
        weight = np.where(inside, weight, 0)
        weight /= weight.sum(1, keepdims=True)
    out = np.zeros((new, old))
    np.add.at(out, (np.arange(new)[:, None], np.clip(taps, 0, old - 1)), weight)
    return out.astype(np.float32)


def resize_positions(
    positions: Array, shape: tuple[int, int], rule: str = "bicubic antialias"
) -> Array:
    """A learned position grid at another size, in float32: (h0, w0, d) to (*shape, d)."""
    if positions.shape[:2] == shape:
        return positions
    rows, columns = (matrix(o, n, rule) for o, n in zip(positions.shape, shape, strict=False))
    high = jax.lax.Precision.HIGHEST
    grid = positions.astype(jnp.float32)
    return jnp.einsum("ab,bcd,ec->aed", rows, grid, columns, precision=high)


def resize_images(images: Array, shape: tuple[int, int], rule: str) -> Array:
    """(b, h, w, 3) in 0 … 255 to (b, *shape, 3) float32, as PIL resizes uint8 images.

    PIL goes along rows first, then along columns, and rounds to whole grey levels after each.
    """
    if images.shape[1:3] == shape:
        return images.astype(jnp.float32)
    high = jax.lax.Precision.HIGHEST

    def along(axis: int, x: Array) -> Array:
        if x.shape[axis] == shape[axis - 1]:
            return x
        weights = matrix(x.shape[axis], shape[axis - 1], rule)
        made = jnp.einsum(("abcd,eb->aecd", "abcd,ec->abed")[axis - 1], x, weights, precision=high)
        return jnp.clip(jnp.floor(made + 0.5), 0, 255)

    return along(1, along(2, images.astype(jnp.float32)))
