"""Crops and colour on the device, with static shapes, one PRNG key a sample.

The host sends uint8 windows; everything random happens here, so a sample's views depend on its key
alone. Resizing and blur are one matrix product a side, which accelerators and CPUs both do well.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Ruifrok & Johnston 2001: optical densities (R, G, B) of haematoxylin, eosin and DAB, unit rows.
HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED = (HED / np.linalg.norm(HED, axis=1, keepdims=True)).astype(np.float32)
FROM_RGB = np.linalg.inv(HED).astype(np.float32)
GREY = np.array([0.299, 0.587, 0.114], np.float32)


@dataclasses.dataclass(frozen=True)
class Crop:
    """One kind of random crop.

    Attributes:
        px: side of the result.
        scale: least and greatest area, as a share of the window's. The magnification of the result is
            that of the window only where sqrt(scale) * window_px is near `px`.
        aspect: least and greatest height / width.
        blur: probability of a Gaussian blur, its sigma drawn from `sigma` (pixels of the result).
        jitter: strengths of brightness, contrast, saturation, hue; applied with p = 0.8.
        grey, solarize: probabilities. hed: strength of stain jitter (Tellez 2019).
    """

    px: int
    scale: tuple[float, float]
    aspect: tuple[float, float] = (0.75, 4 / 3)
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grey: float = 0.2
    solarize: float = 0.0
    hed: float = 0.0


def crops(windows: Array, keys: Array, kind: Crop) -> Array:
    """(b, s, s, 3) uint8 windows and (b,) keys to (b, px, px, 3) float in [0, 1]."""
    return jax.vmap(lambda window, key: _crop(window, key, kind))(windows, keys)


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """(x - mean) / std, images in [0, 1]."""
    return (images - jnp.array(mean)) / jnp.array(std)


def _crop(window: Array, key: Array, kind: Crop) -> Array:
    where, colour, blur = jax.random.split(key, 3)
    side = window.shape[0]
    area, aspect, top, left = jax.random.uniform(where, (4,))
    area = kind.scale[0] + area * (kind.scale[1] - kind.scale[0])
    low, high = math.log(kind.aspect[0]), math.log(kind.aspect[1])
    ratio = jnp.exp(0.5 * (low + aspect * (high - low)))
    extent = jnp.sqrt(area) * side * jnp.stack([ratio, 1 / ratio])
    extent = jnp.minimum(extent, side)
    start = jnp.stack([top, left]) * (side - extent)

    # Cut the smallest static square that holds any such crop: the products below shrink with it.
    reach = math.ceil(math.sqrt(kind.scale[1] * max(kind.aspect[1], 1 / kind.aspect[0])) * side) + 2
    if reach < side:
        corner = jnp.clip(jnp.floor(start).astype(int), 0, side - reach)
        window = jax.lax.dynamic_slice(window, (*corner, 0), (reach, reach, 3))
        start = start - corner

    sigma = jax.random.uniform(blur, (), minval=kind.sigma[0], maxval=kind.sigma[1])
    chosen = jax.random.bernoulli(jax.random.fold_in(blur, 1), kind.blur)
    sigma = jnp.where(chosen, sigma, 0.0)
    rows = _resampling(kind.px, window.shape[0], start[0], extent[0], sigma)
    columns = _resampling(kind.px, window.shape[1], start[1], extent[1], sigma)
    image = window.astype(jnp.float32) / 255
    image = jnp.einsum("oh,hwc->owc", rows, image)
    image = jnp.einsum("ow,hwc->hoc", columns, image)
    return _colour(_turned(image, jax.random.fold_in(where, 1)), colour, kind)


def _resampling(out: int, source: int, start: Array, extent: Array, sigma: Array) -> Array:
    """(out, source) weights: antialiased linear resize of [start, start + extent), then blur."""
    step = extent / out
    centre = start + (jnp.arange(out) + 0.5) * step - 0.5
    distance = jnp.abs(jnp.arange(source)[None] - centre[:, None])
    weights = jnp.maximum(0.0, 1 - distance / jnp.maximum(step, 1.0))
    weights = weights / weights.sum(1, keepdims=True)
    offset = jnp.arange(out)[:, None] - jnp.arange(out)[None]
    gauss = jnp.exp(-0.5 * (offset / jnp.maximum(sigma, 1e-3)) ** 2)
    return (gauss / gauss.sum(1, keepdims=True)) @ weights


def _turned(image: Array, key: Array) -> Array:
    """One of the eight flips and quarter turns."""
    transpose, rows, columns = jax.random.bernoulli(key, 0.5, (3,))
    image = jnp.where(transpose, image.swapaxes(0, 1), image)
    image = jnp.where(rows, image[::-1], image)
    return jnp.where(columns, image[:, ::-1], image)


def _colour(image: Array, key: Array, kind: Crop) -> Array:
    draw = jax.random.uniform(key, (4,), minval=-1.0)
    chance = jax.random.uniform(jax.random.fold_in(key, 1), (3,))
    if kind.hed:
        stain = jax.random.uniform(jax.random.fold_in(key, 2), (2, 3), minval=-1.0) * kind.hed
        density = -jnp.log(jnp.maximum(image, 1 / 255)) @ FROM_RGB
        image = jnp.exp(-(density * (1 + stain[0]) + 0.2 * stain[1]) @ HED)
    jittered = image * (1 + kind.jitter[0] * draw[0])
    mean = (jittered @ GREY).mean()
    jittered = mean + (jittered - mean) * (1 + kind.jitter[1] * draw[1])
    grey = (jittered @ GREY)[..., None]
    jittered = grey + (jittered - grey) * (1 + kind.jitter[2] * draw[2])
    jittered = jittered @ _hue(draw[3] * kind.jitter[3] * 2 * jnp.pi)
    image = jnp.where(chance[0] < 0.8, jittered, image)
    image = jnp.where(chance[1] < kind.grey, (image @ GREY)[..., None], image)
    image = jnp.clip(image, 0.0, 1.0)
    return jnp.where((chance[2] < kind.solarize) & (image > 0.5), 1 - image, image)


def _hue(angle: Array) -> Array:
    """Rotation of colours about the grey axis by `angle` radians (Rodrigues), for row vectors."""
    axis = jnp.full((3,), 3**-0.5)
    cross = jnp.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) * 3**-0.5
    rotation = (
        jnp.cos(angle) * jnp.eye(3)
        + jnp.sin(angle) * cross
        + (1 - jnp.cos(angle)) * axis[:, None] * axis
    )
    return rotation.T
