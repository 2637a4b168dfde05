"""Interpolation against PIL, torch's stored answers and by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pathme_jax.models.resample import RULES, matrix, resize_images, resize_positions


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("old", "new"), [(16, 16), (37, 16), (16, 37), (256, 224), (5, 1)])
def test_rows_sum_to_one(rule, old, new):
    np.testing.assert_allclose(matrix(old, new, rule).sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(("rule", "pil"), [("bicubic", "BICUBIC"), ("bilinear", "BILINEAR")])
@pytest.mark.parametrize("side", [224, 96, 300])
def test_images_are_resized_as_pil_does(rule, pil, side):
    """PIL's weights have 22 bits, so what lies between two grey levels may round the other way,
    in either of the two passes."""
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    theirs = Image.fromarray(image).resize((side, side), getattr(Image.Resampling, pil))
    ours = np.asarray(resize_images(jnp.asarray(image)[None], (side, side), f"{rule} antialias"))[0]
    gap = np.abs(ours - np.asarray(theirs, np.float32))
    assert gap.max() <= 2 and (gap > 1).mean() < 1e-3 and (gap > 0).mean() < 0.06


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match="resample='lanczos'; expected one of bicubic antialias"):
        matrix(4, 5, "lanczos")


def test_positions_keep_their_values_at_their_own_size_and_constants_at_any():
    grid = jnp.asarray(_random(5, 16, 16, 3))
    assert resize_positions(grid, (16, 16)) is grid
    for side in (3, 4, 6):
        flat = resize_positions(jnp.full((16, 16, 2), 0.7), (side, side))
        np.testing.assert_allclose(flat, np.full((side, side, 2), 0.7), rtol=1e-5)


def test_positions_are_interpolated_along_their_own_axes():
    """A ramp over rows stays a rising ramp over rows, constant over columns: no transposition."""
    ramp = jnp.broadcast_to(jnp.arange(16.0)[:, None, None], (16, 16, 1))
    out = np.asarray(resize_positions(ramp, (4, 4)))[..., 0]
    np.testing.assert_allclose(out, np.repeat(out[:, :1], 4, 1), atol=1e-4)
    # rows 0-3, 4-7, … have means 1.5, 5.5, 9.5, 13.5
    np.testing.assert_allclose(out[:, 0], [1.5, 5.5, 9.5, 13.5], atol=0.6)
    wider = np.asarray(resize_positions(ramp, (32, 32)))[:, 0, 0]
    np.testing.assert_allclose(wider[4:-4], (np.arange(32)[4:-4] + 0.5) / 2 - 0.5, atol=1e-3)
