"""Crops and colour on the device, with static shapes, one PRNG key a sample.

The host sends uint8 windows; everything random happens here, so a sample's views depend on its key
alone. Resizing with blur is one matrix product a side, and all colour jitter one 3 x 3 matrix, which
accelerators and CPUs both do well.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.errors import UserError

Array = jax.Array

# Ruifrok & Johnston 2001: optical densities (R, G, B) of haematoxylin, eosin and DAB, unit rows.
HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED = (HED / np.linalg.norm(HED, axis=1, keepdims=True)).astype(np.float32)
FROM_RGB = np.linalg.inv(HED).astype(np.float32)
GREY = np.array([0.299, 0.587, 0.114], np.float32)
TURNS = {"none": (0.0, 0.0, 0.0), "flip": (0.0, 0.5, 0.5), "all": (0.5, 0.5, 0.5)}


@dataclasses.dataclass(frozen=True)
class Crop:
    """One kind of random crop.

    Attributes:
        px: side of the result.
        scale: least and greatest area, as a share of the window's. The magnification of the result is
            that of the window only where sqrt(scale) * window_px is near `px`; see `translation`.
        aspect: least and greatest height / width.
        turns: "none", "flip" (along either axis, each with p = 0.5) or "all" (the eight flips and quarter
            turns alike: tissue has no up).
        blur: probability of a Gaussian blur, its sigma drawn from `sigma` (pixels of the result).
        jitter: strengths of brightness, contrast, saturation, hue; applied with probability `jitter_p`.
        grey, solarize: probabilities.
        hed: strength of stain jitter (Tellez 2019), applied with probability `hed_p`: a stain's density d
            becomes d (1 + a) + 0.2 b, a and b uniform in [-hed, hed].
    """

    px: int
    scale: tuple[float, float]
    aspect: tuple[float, float] = (0.75, 4 / 3)
    turns: str = "all"
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grey: float = 0.2
    solarize: float = 0.0
    hed: float = 0.0
    hed_p: float = 1.0

    def __post_init__(self) -> None:
        if self.turns not in TURNS:
            raise UserError(
                f"turns={self.turns!r} of a crop", f"Expected one of {', '.join(TURNS)}"
            )


def translation(px: int, window_px: int) -> dict[str, Any]:
    """Extended-context translation (Virchow2, Zimmermann 2024): the fields of a Crop that moves but
    hardly zooms, as in Crop(**translation(224, 392)).

    Area within 10 % and aspect within 5 % of the result's, so that either side's magnification stays
    within 8 % of the window's.

    Raises:
        UserError: such a crop does not fit the window.
    """
    scale, aspect = (0.9, 1.1), (0.95, 1.05)
    need = math.ceil(px * math.sqrt(scale[1] * aspect[1]))
    if need > window_px:
        raise UserError(
            f"a translated crop of {px} px needs up to {need} px of a window of {window_px}",
            "Read larger windows or make the crop smaller",
        )
    share = (px / window_px) ** 2
    return {"px": px, "scale": (scale[0] * share, scale[1] * share), "aspect": aspect}


def crops(windows: Array, keys: Array, kind: Crop) -> Array:
    """(b, s, s, 3) uint8 windows and (b,) keys to (b, px, px, 3) float in [0, 1]."""
    return jax.vmap(lambda window, key: _crop(window, key, kind))(windows, keys)


def many(windows: Array, keys: Array, kind: Crop, count: int) -> Array:
    """`count` crops of each window: (b, s, s, 3) uint8 and (b,) keys to (b, count, px, px, 3)."""
    several = jax.vmap(lambda key: jax.random.split(key, count))(keys)
    return jax.vmap(lambda w, ks: jax.vmap(lambda k: _crop(w, k, kind))(ks))(windows, several)


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """(x - mean) / std, images in [0, 1]."""
    return (images - jnp.array(mean)) / jnp.array(std)


def _crop(window: Array, key: Array, kind: Crop) -> Array:
    # One draw for all that is random: each further call would hash anew for every crop.
    draws = jax.random.uniform(key, (23,))
    place, turn, blur, jitter, chance, stain = jnp.split(draws, [4, 7, 9, 13, 17])

    side = window.shape[0]
    area = kind.scale[0] + place[0] * (kind.scale[1] - kind.scale[0])
    low, high = math.log(kind.aspect[0]), math.log(kind.aspect[1])
    ratio = jnp.exp(0.5 * (low + place[1] * (high - low)))
    extent = jnp.minimum(jnp.sqrt(area) * side * jnp.stack([ratio, 1 / ratio]), side)
    start = place[2:] * (side - extent)

    # Cut the smallest static square that holds any such crop: the products below shrink with it.
    reach = math.ceil(math.sqrt(kind.scale[1] * max(kind.aspect[1], 1 / kind.aspect[0])) * side) + 2
    if reach < side:
        corner = jnp.clip(jnp.floor(start).astype(int), 0, side - reach)
        window = jax.lax.dynamic_slice(window, (*corner, 0), (reach, reach, 3))
        start = start - corner

    # Turning before the products moves a few bytes and rows of weights, not the float image.
    transpose, *flips = turn < jnp.array(TURNS[kind.turns])
    window = jnp.where(transpose, window.swapaxes(0, 1), window)
    start, extent = (
        jnp.where(transpose, start[::-1], start),
        jnp.where(transpose, extent[::-1], extent),
    )
    sigma = jnp.where(
        blur[0] < kind.blur, kind.sigma[0] + blur[1] * (kind.sigma[1] - kind.sigma[0]), 0
    )
    rows, columns = (
        _resampling(kind.px, window.shape[0], start[i], extent[i], sigma, flips[i]) for i in (0, 1)
    )
    image = window.transpose(2, 0, 1).astype(jnp.float32) / 255
    image = jnp.einsum("oh,chw,pw->cop", rows, image, columns)
    return _colour(image, jitter, chance, stain, kind).transpose(1, 2, 0)


def _resampling(
    out: int, source: int, start: Array, extent: Array, sigma: Array, flip: Array
) -> Array:
    """(out, source) weights: antialiased linear resize of [start, start + extent), then blur."""
    step = extent / out
    centre = start + (jnp.arange(out) + 0.5) * step - 0.5
    distance = jnp.abs(jnp.arange(source)[None] - centre[:, None])
    weights = jnp.maximum(0.0, 1 - distance / jnp.maximum(step, 1.0))
    weights = weights / weights.sum(1, keepdims=True)
    offset = jnp.arange(out)[:, None] - jnp.arange(out)[None]
    gauss = jnp.exp(-0.5 * (offset / jnp.maximum(sigma, 1e-3)) ** 2)
    gauss = gauss / gauss.sum(1, keepdims=True)
    return jnp.where(flip, gauss[::-1], gauss) @ weights


def _colour(image: Array, jitter: Array, chance: Array, stain: Array, kind: Crop) -> Array:
    """(3, h, w) in [0, 1] and uniform draws to the same: stain jitter, colour jitter, grey, solarize."""
    if kind.hed:
        factor, shift = (2 * stain.reshape(2, 3) - 1) * kind.hed * (chance[0] < kind.hed_p)
        stains = (HED.T * (1 + factor)) @ FROM_RGB.T  # optical density to density, and back
        density = -jnp.log(jnp.maximum(image, 1 / 255))
        image = jnp.exp(-_mixed(density, stains, 0.2 * shift @ HED))

    # Every step of colour jitter is affine in RGB, and so is grey: one matrix and one offset, the latter
    # along the grey axis, which saturation, hue and grey leave as it is.
    strength = (2 * jitter - 1) * jnp.array(kind.jitter) * (chance[1] < kind.jitter_p)
    brightness, contrast, saturation = 1 + strength[:3]
    grey = jnp.tile(GREY, (3, 1))
    matrix = brightness * contrast * (grey + saturation * (jnp.eye(3) - grey))
    matrix = _hue(strength[3] * 2 * jnp.pi) @ matrix
    matrix = jnp.where(chance[2] < kind.grey, grey @ matrix, matrix)
    offset = (1 - contrast) * brightness * (image.mean((1, 2)) @ GREY)
    image = jnp.clip(_mixed(image, matrix, jnp.full(3, offset)), 0.0, 1.0)
    return jnp.where((chance[3] < kind.solarize) & (image > 0.5), 1 - image, image)


def _mixed(image: Array, matrix: Array, offset: Array) -> Array:
    """matrix @ colour + offset of every pixel: (3, h, w), (3, 3) and (3,) to (3, h, w)."""
    # Spelt out: XLA fuses three products with what comes before and after, a dot or a sum it does not.
    r, g, b = (matrix[:, c, None, None] * image[c] for c in range(3))
    return r + g + b + offset[:, None, None]


def _hue(angle: Array) -> Array:
    """Rotation of column vectors of colour about the grey axis by `angle` radians (Rodrigues)."""
    axis = jnp.full((3,), 3**-0.5)
    cross = jnp.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) * 3**-0.5
    return (
        jnp.cos(angle) * jnp.eye(3)
        + jnp.sin(angle) * cross
        + (1 - jnp.cos(angle)) * axis[:, None] * axis
    )
