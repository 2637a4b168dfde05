"""Fixed encoders without weights: an expert for MEKD where no other is at hand, and a control."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pathme_jax.views.images import FROM_RGB

Array = jax.Array

SCALES = 4  # octaves of texture


def mean_rgb(images: Array) -> Array:
    """(b, h, w, 3) uint8 to (b, 3) in [0, 1]: what colour alone can tell."""
    return images.astype(jnp.float32).mean((1, 2)) / 255


def hed_texture(images: Array) -> Array:
    """(b, h, w, 3) uint8 to (b, 26): stain statistics and texture energy, no learning.

    Mean and deviation of haematoxylin, eosin and residual density (6); then, for haematoxylin and eosin and each of four octaves, the log
    energy of Haar details along the axes (both together, so a quarter turn changes nothing) and of the
    diagonal (16); and the deviation of the remaining low-pass image with its skew (4).
    """
    density = -jnp.log(jnp.maximum(images.astype(jnp.float32) / 255, 1 / 255)) @ FROM_RGB
    parts = [density.mean((1, 2)), density.std((1, 2))]
    low = density[..., :2]
    for _ in range(SCALES):
        a, b = low[:, 0::2, 0::2], low[:, 0::2, 1::2]
        c, d = low[:, 1::2, 0::2], low[:, 1::2, 1::2]
        axes = ((a - b + c - d) ** 2 + (a + b - c - d) ** 2) / 2
        parts.append(jnp.log(axes.mean((1, 2)) + 1e-6))
        parts.append(jnp.log(((a - b - c + d) ** 2).mean((1, 2)) + 1e-6))
        low = (a + b + c + d) / 4
    centred = low - low.mean((1, 2), keepdims=True)
    spread = jnp.sqrt((centred**2).mean((1, 2)) + 1e-8)
    parts += [spread, (centred**3).mean((1, 2)) / spread**3]
    return jnp.concatenate(parts, -1)
