"""Crops and colour: identity where nothing is asked for, keyed by sample, values in [0, 1]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.views.images import GREY, Crop, crops, normalise

PLAIN = dict(aspect=(1.0, 1.0), blur=0.0, jitter=(0.0, 0.0, 0.0, 0.0), grey=0.0)
make = jax.jit(
    crops,
    static_argnums=2,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def _keys(n: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), n)


def _windows(n: int, side: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3)).astype(np.uint8)


def _dihedral(image: np.ndarray) -> list[np.ndarray]:
    turned = [np.rot90(image, k) for k in range(4)]
    return turned + [t[:, ::-1] for t in turned]


def test_a_crop_of_the_whole_window_is_the_window_up_to_a_flip_or_quarter_turn():
    windows = _windows(40)
    out = np.asarray(make(windows, _keys(40), Crop(px=24, scale=(1.0, 1.0), **PLAIN)))
    seen = set()
    for window, image in zip(windows, out, strict=True):
        errors = [np.abs(image - t / 255).max() for t in _dihedral(window)]
        assert min(errors) < 1e-5
        seen.add(int(np.argmin(errors)))
    assert seen == set(range(8))  # all eight, so glands have no up


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
    side, n = 96, 60
    row, column = np.mgrid[0:side, 0:side].astype(np.uint8)
    window = np.stack([row, column, 0 * row], -1)
    kind = Crop(px=48, scale=scale, **{**PLAIN, "aspect": (0.75, 4 / 3)})
    out = np.asarray(make(np.repeat(window[None], n, 0), _keys(n), kind)) * 255
    for image in out:
        # the inner half is free of the border's renormalised weights
        inner = image[12:36, 12:36, :2].reshape(-1, 2)
        extent = (inner.max(0) - inner.min(0)) * 48 / 23
        area, ratio = extent[0] * extent[1] / side**2, extent[0] / extent[1]
        assert scale[0] * 0.97 < area < scale[1] * 1.03
        assert 0.75 * 0.97 < ratio < 4 / 3 * 1.03
    assert out[..., :2].min() < 3 and out[..., :2].max() > side - 4  # reaches every edge


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


STRONG = dict(
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
