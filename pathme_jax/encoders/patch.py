"""A patch encoder as one function of its parameters: uint8 images to features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pathme_jax.encoders.zoo import Definition, Input
from pathme_jax.errors import UserError
from pathme_jax.models.pooler import AttentionalPooler
from pathme_jax.models.resample import resize_images
from pathme_jax.models.vit import ViT

Array = jax.Array
Params = Mapping[str, Any]  # {"backbone": ViT's[, "pooler": AttentionalPooler's]}


def prepare(images: Array, how: Input) -> Array:
    """(b, h, w, 3) uint8 to (b, crop, crop, 3) float32: resized, centre-cropped, normalised.

    Cut into parts, (b * parts, part, part, 3), the parts of an image side by side.

    As torchvision's Resize, CenterCrop, ToTensor and Normalize do it on PIL images.

    Raises:
        UserError: the image is smaller than the crop, or does not divide into parts.
    """
    h, w = images.shape[1:3]
    if how.resize:
        scale = how.resize / min(h, w)
        h, w = (how.resize if side == min(h, w) else int(side * scale) for side in (h, w))
    x = resize_images(images, (h, w), how.resample)
    if how.crop:
        if how.crop > min(h, w):
            raise UserError(
                f"images of {h}x{w} px are smaller than the crop of {how.crop} px",
                "Give larger tiles",
            )
        top, left = round((h - how.crop) / 2), round((w - how.crop) / 2)
        x = x[:, top : top + how.crop, left : left + how.crop]
    b, h, w, _ = x.shape
    if 0 < how.part < max(h, w):
        if h % how.part or w % how.part:
            raise UserError(
                f"images of {h}x{w} px do not divide into parts of {how.part} px",
                "Give tiles of another size",
            )
        x = x.reshape(b, h // how.part, how.part, w // how.part, how.part, 3).swapaxes(2, 3)
        x = x.reshape(-1, how.part, how.part, 3)
    return (x / 255 - jnp.array(how.mean)) / jnp.array(how.std)


def encode(definition: Definition, params: Params, images: Array, dtype: str = "float32") -> Array:
    """(b, h, w, 3) uint8 to features (b, width) in float32.

    dtype: of the computation; normalisation, softmax and LayerNorm's statistics are float32 throughout. With
        "float32" products are of full precision too, where a GPU or TPU would shorten them.

    Raises:
        UserError: see `prepare`; or what the model sees does not divide into its patches.
    """
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        return _encode(definition, params, images, dtype)


def _encode(definition: Definition, params: Params, images: Array, dtype: str) -> Array:
    vit: Any = ViT(**definition.model, dtype=dtype)
    prepared = prepare(images, definition.input)
    h, w = prepared.shape[1:3]
    if h % vit.patch or w % vit.patch:
        raise UserError(
            f"{definition.name} sees images of {h}x{w} px, which do not divide into its patches of {vit.patch} px",
            "Give tiles of another size",
        )
    out = vit.apply({"params": params["backbone"]}, prepared)
    cls, tokens = out["cls"], out["tokens"]
    if definition.output == "cls":
        features = cls
    elif definition.output == "cls+mean":
        features = jnp.concatenate([cls, tokens.astype(jnp.float32).mean(1)], -1)
    else:
        pooler: Any = AttentionalPooler(**definition.pooler or {}, dtype=dtype)
        everything = jnp.concatenate([cls[:, None], tokens], 1)
        features = pooler.apply({"params": params["pooler"]}, everything)
    return features.astype(jnp.float32).reshape(images.shape[0], -1, definition.width).mean(1)


def abstract(definition: Definition) -> dict[str, Any]:
    """Shapes and types of the parameters, without making any."""

    def init() -> dict[str, Any]:
        vit: Any = ViT(**definition.model)
        side = definition.model["patch"] * definition.model["grid"]
        params = {"backbone": vit.init(jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]}
        if definition.pooler:
            tokens = jnp.zeros((1, 2, definition.model["width"]))
            pooler: Any = AttentionalPooler(**definition.pooler)
            params["pooler"] = pooler.init(jax.random.key(0), tokens)["params"]
        return params

    return jax.eval_shape(init)


def released_parameters(definition: Definition) -> int:
    """How many numbers the released encoder has: ours, without the mask token, with the positions of CLS
    and registers that ours are added to."""
    params = abstract(definition)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    width = definition.model["width"]
    own = {
        "patches": 0,
        "cls+patches": 1,
        "cls+registers+patches": 1 + definition.model["registers"],
    }
    return count - width + own[definition.positions] * width
