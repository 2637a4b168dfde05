"""From pixels to the model's input, and from its tokens to a feature."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pathme_jax.encoders import patch
from pathme_jax.encoders.zoo import Definition, Input
from pathme_jax.errors import UserError
from pathme_jax.models.vit import ViT

SMALL = Definition(
    "small",
    dict(patch=8, width=16, depth=2, heads=2, layer_scale=1.0, grid=4, registers=2),
    Input(resize=32, crop=32),
    positions="patches",
    licence="Apache-2.0",
    source="here",
)


def _images(b: int, h: int, w: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (b, h, w, 3)).astype(np.uint8)


def _drawn(definition: Definition) -> Any:
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), patch.abstract(definition)
    )


def test_images_are_resized_cropped_and_normalised_as_pil_and_torchvision_do():
    """Resize(48) of a 64 x 96 image is 48 x 72; CenterCrop(32) then begins at (8, 20)."""
    how = Input(resize=48, crop=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    image = _images(1, 64, 96)
    resized = Image.fromarray(image[0]).resize((72, 48), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((20, 8, 52, 40)), np.float32) / 255
    expected = (expected - np.array(how.mean)) / np.array(how.std)
    gap = np.abs(np.asarray(patch.prepare(image, how))[0] - expected) * np.array(how.std) * 255
    assert (
        gap.max() < 1.01 and (gap > 0.5).mean() < 1e-3
    )  # a grey level, where PIL rounds otherwise


def test_images_of_the_right_size_are_not_touched():
    image = _images(1, 32, 32)
    how = Input(resize=32, crop=32, mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_allclose(patch.prepare(image, how), image / 255, atol=1e-7)


def test_parts_are_the_quarters_of_an_image_and_their_features_are_averaged():
    how = Input(resize=0, crop=0, part=32, mean=(0, 0, 0), std=(1, 1, 1))
    images = _images(2, 64, 64)
    parts = np.asarray(patch.prepare(images, how)) * 255
    assert parts.shape == (8, 32, 32, 3)
    np.testing.assert_allclose(parts[5], images[1, :32, 32:], atol=1e-4)
    cut = dataclasses.replace(SMALL, input=how)
    params = _drawn(cut)
    whole = patch.encode(cut, params, images)
    each = [
        patch.encode(cut, params, images[:, r : r + 32, c : c + 32])
        for r in (0, 32)
        for c in (0, 32)
    ]
    np.testing.assert_allclose(whole, np.mean(each, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Input(resize=0, crop=64), "images of 48x48 px are smaller than the crop of 64 px"),
        (Input(resize=0, crop=0, part=32), "do not divide into parts of 32 px"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(how, message):
    with pytest.raises(UserError, match=message):
        patch.prepare(_images(1, 48, 48), how)


def test_the_output_rule_is_cls_or_cls_beside_the_mean_of_patches_without_registers():
    params, images = _drawn(SMALL), _images(2, 32, 32)
    vit: Any = ViT(**SMALL.model)
    out = vit.apply({"params": params["backbone"]}, patch.prepare(images, SMALL.input))
    assert out["tokens"].shape[1] == 16
    np.testing.assert_allclose(patch.encode(SMALL, params, images), out["cls"], rtol=1e-5)
    both = dataclasses.replace(SMALL, output="cls+mean")
    expected = jnp.concatenate([out["cls"], out["tokens"].mean(1)], -1)
    assert both.width == 32
    np.testing.assert_allclose(patch.encode(both, params, images), expected, rtol=1e-5, atol=1e-6)


def test_the_pooler_looks_at_cls_and_patches():
    pooled = dataclasses.replace(SMALL, output="pooler", pooler=dict(width=24, heads=3))
    params, images = _drawn(pooled), _images(2, 32, 32)
    out = np.asarray(patch.encode(pooled, params, images))
    assert out.shape == (2, 24)
    for leaf, value in params["backbone"].items():
        if leaf in ("cls_token", "positions"):
            other = {
                **params,
                "backbone": {**params["backbone"], leaf: 2 * value},
            }  # (a shift is what LayerNorm removes)
            assert np.abs(patch.encode(pooled, other, images) - out).max() > 1e-3


def test_bfloat16_is_near_float32():
    params, images = _drawn(SMALL), _images(4, 32, 32)
    exact = np.asarray(patch.encode(SMALL, params, images))
    short = np.asarray(patch.encode(SMALL, params, images, "bfloat16"))
    assert short.dtype == np.float32
    gap = np.abs(short - exact).max() / np.abs(exact).max()
    assert 0 < gap < 0.05
