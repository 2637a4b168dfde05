"""Crops and colour: identity where nothing is asked for, keyed by sample, values in [0, 1]."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pathme_jax.errors import UserError
from pathme_jax.views import images
from pathme_jax.views.images import FROM_RGB, GREY, HED, Crop, crops, many, normalise, translation

PLAIN: Any = dict(aspect=(1.0, 1.0), blur=0.0, jitter=(0.0, 0.0, 0.0, 0.0), grey=0.0)
make = jax.jit(crops, static_argnums=2)


def _keys(n: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


def _windows(n: int, side: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def _dihedral(image: np.ndarray) -> list[np.ndarray]:
    turned = [np.rot90(image, k) for k in range(4)]
    return turned + [t[:, ::-1] for t in turned]


@pytest.mark.parametrize(
    ("turns", "expected"), [("none", {0}), ("flip", {0, 2, 4, 6}), ("all", set(range(8)))]
)
def test_a_crop_of_the_whole_window_is_the_window_up_to_a_flip_or_quarter_turn(turns, expected):
    windows, kind = _windows(80), Crop(px=24, scale=(1.0, 1.0), turns=turns, **PLAIN)
    out = np.asarray(make(windows, _keys(80), kind))
    seen = []
    for window, image in zip(windows, out, strict=True):
        errors = [np.abs(image - t / 255).max() for t in _dihedral(window)]
        assert min(errors) < 1e-5
        seen.append(int(np.argmin(errors)))
    assert set(seen) == expected
    assert np.bincount(seen).max() < 2 * 80 / len(expected) or turns == "none"


def test_a_misspelt_turn_is_refused():
    with pytest.raises(UserError, match="none, flip, all"):
        Crop(px=8, scale=(1.0, 1.0), turns="half")


@pytest.mark.parametrize(
    "box", [(3.3, 10.7, 200.1, 150.2), (40.0, 0.0, 100.0, 110.5), (90, 90, 40, 40)]
)
def test_resizing_agrees_with_pillow(box):
    """Left, top, width, height of a smooth picture with grain, made smaller and larger."""
    top, left, height, width = box
    side, px = 256, 96
    y, x = np.mgrid[0:side, 0:side] / side
    waves = np.stack([np.sin(9 * x + 5 * y), np.cos(20 * x * y), np.sin(40 * y)], -1)
    noise = np.random.default_rng(0).normal(size=waves.shape) * 0.2
    picture = np.clip((waves + noise) * 100 + 128, 0, 255).astype(np.uint8)
    weigh = jax.jit(images._resampling, static_argnums=(0, 1))
    rows = weigh(px, side, top, height, 0.0, False)
    columns = weigh(px, side, left, width, 0.0, False)
    ours = np.einsum("oh,pw,hwc->opc", rows, columns, picture, optimize=True)
    resized = Image.fromarray(picture).resize(
        (px, px), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    error = np.abs(ours - np.asarray(resized))
    assert error.mean() < 0.5 and error.max() < 2  # of 255; Pillow rounds twice, to whole levels


def _extents(kind: Crop, side: int, n: int = 80) -> np.ndarray:
    """(n, 2) rows and columns of the window that n crops of it span."""
    row, column = np.mgrid[0:side, 0:side].astype(np.uint8)
    window = np.stack([row, column, 0 * row], -1)
    out = np.asarray(make(np.repeat(window[None], n, 0), _keys(n), kind)) * 255
    edge = kind.px // 4  # the inner half is free of the border's renormalised weights
    inner = out[:, edge:-edge, edge:-edge, :2].reshape(n, -1, 2)
    return np.ptp(inner, axis=1) * kind.px / (kind.px - 2 * edge - 1)


@pytest.mark.parametrize(("px", "window"), [(56, 98), (56, 61)])
def test_translated_crops_keep_the_magnification_within_10_percent_and_move(px, window):
    kind = Crop(**translation(px, window), turns="none", blur=0.0, jitter=(0.0,) * 4, grey=0.0)
    zoom = _extents(kind, window) / px
    assert 0.9 < zoom.min() < 0.96 and 1.04 < zoom.max() < 1.1
    ratio = zoom[:, 0] / zoom[:, 1]
    assert 0.945 < ratio.min() < 0.97 and 1.03 < ratio.max() < 1.055


def test_a_window_too_small_to_translate_in_is_refused():
    with pytest.raises(UserError, match="needs up to 241 px of a window of 240"):
        translation(224, 240)
    translation(224, 241)


def test_many_crops_of_a_window_are_sample_major_and_each_its_own():
    windows, keys, kind = _windows(3), _keys(3), Crop(px=12, scale=(0.2, 0.5))
    several = jax.jit(many, static_argnums=(2, 3))
    out = np.asarray(several(windows, keys, kind, 4))
    assert out.shape == (3, 4, 12, 12, 3)
    for i in range(3):
        alone = make(np.repeat(windows[i : i + 1], 4, 0), jax.random.split(keys[i], 4), kind)
        np.testing.assert_allclose(out[i], alone, atol=1e-6)
    assert all(np.abs(out[:, i] - out[:, j]).mean() > 0.01 for i in range(4) for j in range(i))
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(several(windows[order], keys[order], kind, 4), out[order], atol=1e-6)


def _jittered(image: np.ndarray, strength: np.ndarray, grey: bool) -> np.ndarray:
    """Brightness, contrast, saturation, hue and grey one after another, (h, w, 3), in float64."""
    mean = lambda x: x @ GREY.astype(float)  # noqa: E731
    image = image * (1 + strength[0])
    image = mean(image).mean() + (image - mean(image).mean()) * (1 + strength[1])
    image = mean(image)[..., None] + (image - mean(image)[..., None]) * (1 + strength[2])
    angle, axis = strength[3] * 2 * np.pi, np.full(3, 3**-0.5)
    image = (  # Rodrigues
        image * np.cos(angle)
        + np.cross(axis, image) * np.sin(angle)
        + (image @ axis)[..., None] * axis * (1 - np.cos(angle))
    )
    return np.repeat(mean(image)[..., None], 3, -1) if grey else image


def test_colour_in_one_matrix_is_the_steps_one_after_another():
    rng = np.random.default_rng(4)
    kind = Crop(
        px=6, scale=(1.0, 1.0), jitter=(0.4, 0.3, 0.2, 0.1), grey=0.5, solarize=0.5, hed=0.2
    )
    colour = jax.jit(images._colour, static_argnums=4)
    for _ in range(12):
        image, jitter, chance, stain = (rng.random(n) for n in ((5, 6, 3), 4, 4, 6))
        jitter[:2] *= 0.3  # towards darker and duller, so that little is clipped
        ours = colour(image.transpose(2, 0, 1), jitter, chance, stain, kind)

        factor, shift = (2 * stain.reshape(2, 3) - 1) * 0.2
        density = -np.log(np.maximum(image, 1 / 255)) @ FROM_RGB
        stained = np.exp(-(density * (1 + factor) + 0.2 * shift) @ HED)
        strength = (2 * jitter - 1) * kind.jitter * (chance[1] < 0.8)
        expected = np.clip(_jittered(stained, strength, bool(chance[2] < 0.5)), 0, 1)
        if chance[3] < 0.5:
            expected = np.where(expected > 0.5, 1 - expected, expected)
        wrong = np.abs(np.asarray(ours).transpose(1, 2, 0) - expected) > 1e-5
        assert wrong.mean() < 0.02  # a value within rounding of 0.5 may be solarized or not


@pytest.mark.parametrize(
    "what", [{"hed": 0.3, "hed_p": 0.4}, {"jitter": (0.4,) * 4, "jitter_p": 0.4}]
)
def test_stain_and_colour_jitter_happen_with_their_probability(what):
    plain = _one_colour(Crop(px=4, scale=(1.0, 1.0), **PLAIN))[0]
    out = _one_colour(Crop(px=4, scale=(1.0, 1.0), **{**PLAIN, **what}))
    changed = np.abs(out - plain).max(1) > 1e-4
    assert 0.3 < changed.mean() < 0.5


def test_halving_a_window_is_an_antialiased_average():
    """Triangle weights over twice the step, as PIL's and torch's antialiased bilinear resize have."""
    window = _windows(1)
    out = np.asarray(make(window, _keys(1), Crop(px=12, scale=(1.0, 1.0), **PLAIN)))[0]
    weights = np.zeros((12, 24))
    for o in range(12):
        for i in range(24):
            weights[o, i] = max(0.0, 1 - abs(i - (2 * o + 0.5)) / 2)
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("oh,pw,hwc->opc", weights, weights, window[0] / 255)
    assert min(np.abs(out - t).max() for t in _dihedral(expected)) < 1e-5


@pytest.mark.parametrize("scale", [(0.05, 0.32), (0.16, 0.45), (0.32, 1.0)])
def test_a_crop_takes_its_share_of_the_window_within_the_aspect(scale):
    """A window whose red is the row and green the column tells where a crop came from."""
    kind = Crop(px=48, scale=scale, **{**PLAIN, "aspect": (0.75, 4 / 3)})
    extent = _extents(kind, side=96)
    area, ratio = extent.prod(1) / 96**2, extent[:, 0] / extent[:, 1]
    assert (scale[0] * 0.97 < area).all() and (area < scale[1] * 1.03).all()
    assert (0.75 * 0.97 < ratio).all() and (ratio < 4 / 3 * 1.03).all()
    # the turned crop of a window is that of the turned window, so the longer side may be either
    assert ratio.min() < 0.85 and ratio.max() > 1.2


def test_crops_reach_every_edge_of_the_window():
    row, column = np.mgrid[0:96, 0:96].astype(np.uint8)
    window = np.stack([row, column, 0 * row], -1)
    kind = Crop(px=32, scale=(0.1, 0.2), **PLAIN)
    out = np.asarray(make(np.repeat(window[None], 80, 0), _keys(80), kind)) * 255
    for axis in (0, 1):
        assert out[..., axis].min() < 3 and out[..., axis].max() > 93


def test_cutting_the_smallest_square_first_changes_nothing_inside():
    """Small crops are cut before they are resampled; a shifted corner would shift the picture."""
    side = 64
    ramp = np.repeat(np.arange(side, dtype=np.uint8)[None, :, None], side, 0).repeat(3, 2) * 2
    out = np.asarray(
        make(np.repeat(ramp[None], 20, 0), _keys(20), Crop(px=16, scale=(0.0625, 0.0625), **PLAIN))
    )
    for image in out * 255 / 2:
        line = image[..., 0]
        line = line if np.ptp(line[0]) > np.ptp(line[:, 0]) else line.T
        np.testing.assert_allclose(
            np.abs(np.diff(line[0])), 1, atol=1e-3
        )  # one source pixel a step
        assert 0 <= line.min() and line.max() <= side - 1


def test_the_mean_colour_survives_without_jitter():
    flat = np.broadcast_to(np.array([180, 90, 160], np.uint8), (6, 32, 32, 3))
    kind = Crop(px=20, scale=(0.1, 1.0), **{**PLAIN, "blur": 1.0})
    out = np.asarray(make(flat, _keys(6), kind))
    np.testing.assert_allclose(out, flat[:, :20, :20] / 255, atol=1e-5)


STRONG: Any = dict(
    px=16, scale=(0.1, 1.0), jitter=(0.9, 0.9, 0.9, 0.5), grey=0.3, solarize=0.3, hed=0.5, blur=0.5
)


def test_values_stay_between_0_and_1_whatever_the_colours():
    windows = np.concatenate(
        [_windows(30), np.full((5, 24, 24, 3), 255, np.uint8), np.zeros((5, 24, 24, 3), np.uint8)]
    )
    out = np.asarray(make(windows, _keys(40), Crop(**STRONG)))
    assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1


def test_a_view_belongs_to_the_sample_not_to_the_slot():
    windows, keys = _windows(8), _keys(8)
    order = np.array([5, 2, 7, 0, 1, 6, 4, 3])
    kind = Crop(**STRONG)
    np.testing.assert_allclose(
        make(windows[order], keys[order], kind),
        np.asarray(make(windows, keys, kind))[order],
        atol=1e-6,
    )


def test_blur_smooths_and_its_probability_is_kept():
    windows = np.repeat(_windows(1), 200, 0)
    plain = Crop(px=24, scale=(1.0, 1.0), **PLAIN)
    kind = Crop(px=24, scale=(1.0, 1.0), **{**PLAIN, "blur": 0.5}, sigma=(1.0, 2.0))
    sharp, out = (np.asarray(make(windows, _keys(200), k)) for k in (plain, kind))
    rough = lambda x: np.abs(np.diff(x, axis=1)).mean((1, 2, 3))  # noqa: E731
    blurred = rough(out) < 0.6 * rough(sharp)
    assert 0.35 < blurred.mean() < 0.65
    np.testing.assert_allclose(out[~blurred], sharp[~blurred], atol=1e-5)


def test_a_blur_is_a_gaussian_of_its_sigma():
    spot = np.zeros((1, 25, 25, 3), np.uint8)
    spot[0, 12, 12] = 255
    kind = Crop(px=25, scale=(1.0, 1.0), **{**PLAIN, "blur": 1.0}, sigma=(1.5, 1.5))
    out = np.asarray(make(spot, _keys(1), kind))[0, ..., 0]
    line = np.exp(-0.5 * ((np.arange(25) - 12) / 1.5) ** 2)
    line /= line.sum()
    np.testing.assert_allclose(out, np.outer(line, line), atol=1e-5)


def _one_colour(kind: Crop, n: int = 300) -> np.ndarray:
    """The colours n keys make of one lilac."""
    lilac = np.broadcast_to(np.array([170, 110, 180], np.uint8), (n, 4, 4, 3))
    return np.asarray(make(lilac, _keys(n), kind))[:, 0, 0]


def _jitter(**change: float) -> Crop:
    order = ("brightness", "contrast", "saturation", "hue")
    jitter = tuple(change.get(name, 0.0) for name in order)
    return Crop(px=4, scale=(1.0, 1.0), **{**PLAIN, "jitter": jitter})


def test_brightness_multiplies_all_colours_alike_within_its_strength():
    factor = _one_colour(_jitter(brightness=0.3)) / (np.array([170, 110, 180]) / 255)
    np.testing.assert_allclose(np.ptp(factor, axis=1), 0, atol=1e-5)
    assert 0.7 - 1e-5 <= factor.min() < 0.75 and 1.25 < factor.max() <= 1.3 + 1e-5
    assert 0.1 < (np.abs(factor[:, 0] - 1) < 1e-5).mean() < 0.3  # left alone with p = 0.2


@pytest.mark.parametrize("change", [{"saturation": 0.5}, {"hue": 0.1}])
def test_saturation_and_hue_move_colour_but_not_what_they_keep(change):
    colours = _one_colour(_jitter(**change))
    assert np.ptp(colours, axis=0).max() > 0.05
    if "saturation" in change:
        np.testing.assert_allclose(colours @ GREY, colours[0] @ GREY, atol=1e-5)
    else:  # a rotation about the grey axis keeps the mean and the distance from grey
        np.testing.assert_allclose(colours.mean(1), colours[0].mean(), atol=1e-5)
        np.testing.assert_allclose(colours.std(1), colours[0].std(), atol=1e-5)


def test_hue_leaves_grey_grey():
    grey = np.full((50, 4, 4, 3), 128, np.uint8)
    out = np.asarray(make(grey, _keys(50), _jitter(hue=0.5)))
    np.testing.assert_allclose(out, 128 / 255, atol=1e-5)


def test_grey_and_solarize_happen_with_their_probability():
    plain = _one_colour(_jitter())[0]
    grey = _one_colour(Crop(px=4, scale=(1.0, 1.0), **{**PLAIN, "grey": 0.3}))
    turned = np.ptp(grey, axis=1) < 1e-5
    assert 0.2 < turned.mean() < 0.4
    np.testing.assert_allclose(grey[turned], plain @ GREY, atol=1e-5)
    sun = _one_colour(Crop(px=4, scale=(1.0, 1.0), **PLAIN, solarize=0.3))
    turned = np.abs(sun - plain).max(1) > 1e-5
    assert 0.2 < turned.mean() < 0.4
    expected = np.where(plain > 0.5, 1 - plain, plain)
    np.testing.assert_allclose(sun[turned], np.broadcast_to(expected, sun[turned].shape), atol=1e-5)


def test_hed_jitter_of_nearly_no_strength_changes_nearly_nothing():
    windows = np.clip(_windows(4), 2, 255)
    plain = make(windows, _keys(4), Crop(px=24, scale=(1.0, 1.0), **PLAIN))
    slight = make(windows, _keys(4), Crop(px=24, scale=(1.0, 1.0), **PLAIN, hed=1e-6))
    np.testing.assert_allclose(slight, plain, atol=1e-4)


def test_hed_jitter_stains_tissue_more_than_glass():
    """Multiplying stain densities moves what is stained; white has none."""
    white = np.full((200, 4, 4, 3), 255, np.uint8)
    kind = Crop(px=4, scale=(1.0, 1.0), **PLAIN, hed=0.1)
    tissue = _one_colour(kind, 200).std(0).mean()
    glass = np.asarray(make(white, _keys(200), kind))[:, 0, 0].std(0).mean()
    assert tissue > 2 * glass > 0


def test_normalise_is_per_channel():
    image = jnp.full((2, 2, 3), 0.5)
    out = normalise(image, (0.5, 0.4, 0.3), (1.0, 0.5, 0.1))
    np.testing.assert_allclose(out[0, 0], [0.0, 0.2, 2.0], atol=1e-6)
