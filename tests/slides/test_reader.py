"""µm/px comes from the file or is an error; pixels come from the right level, unchanged where possible."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.slides.reader import (
    OpenSlideReader,
    level_for,
    open_slide,
    read_scaled,
    resize,
    slide_mpp,
)

CM = {"tiff.ResolutionUnit": "centimeter"}


@pytest.mark.parametrize(
    ("properties", "mpp"),
    [
        ({"openslide.mpp-x": "0.25", "aperio.MPP": "0.5"}, 0.25),
        ({"aperio.MPP": "0.499"}, 0.499),
        ({"hamamatsu.mpp-x": "0.23"}, 0.23),
        ({**CM, "tiff.XResolution": "20000"}, 0.5),
        ({"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800"}, 0.5),
    ],
)
def test_mpp_is_read_from_each_key_in_turn(properties, mpp):
    assert slide_mpp(properties) == pytest.approx(mpp)


@pytest.mark.parametrize(
    ("properties", "says"),
    [
        ({}, "does not state"),
        ({"tiff.ResolutionUnit": "none", "tiff.XResolution": "1"}, "does not state"),
        ({**CM, "tiff.XResolution": "0"}, "does not state"),
        ({"tiff.ResolutionUnit": "inch", "tiff.XResolution": "72"}, "352"),
        ({"aperio.MPP": "unknown"}, "nan"),
        ({"openslide.mpp-x": "0"}, "0 µm/px"),
    ],
)
def test_missing_or_implausible_mpp_names_its_cure(properties, says):
    with pytest.raises(UserError, match=says) as caught:
        slide_mpp(properties)
    assert "--mpp-csv" in caught.value.cure


def levels(*mpps: float) -> SimpleNamespace:
    return SimpleNamespace(mpp=mpps[0], level_mpps=mpps)


def test_level_is_the_coarsest_that_needs_no_more_than_the_allowed_enlargement():
    slide = levels(0.25, 0.5044, 1.0088)
    assert level_for(slide, 0.5, 1.05) == 1
    assert level_for(slide, 0.5, 1.0) == 0
    assert level_for(slide, 0.9, 1.05) == 1
    assert level_for(slide, 8.0, 1.05) == 2


def test_too_coarse_a_slide_names_an_mpp_it_can_serve():
    slide = levels(1.0088)
    with pytest.raises(UserError, match="too coarse") as caught:
        level_for(slide, 0.5, 1.05)
    assert caught.value.cure.endswith("--mpp 1")
    assert level_for(slide, 1.0, 1.05) == 0


def test_pixels_are_the_files_own_and_white_outside(tmp_path, paint, write_tiff):
    image = paint()
    with open_slide(write_tiff(tmp_path / "a.tiff", image)) as slide:
        assert slide.mpp == pytest.approx(0.5)
        assert (slide.read(0, 100, 50, 300, 200) == image[50:250, 100:400]).all()
        overhang = slide.read(0, 1000, 1000, 200, 200)
    assert (overhang[:100, :100] == image[1000:, 1000:]).all()
    assert (overhang[100:] == 255).all() and (overhang[:, 100:] == 255).all()


def test_given_mpp_goes_before_the_files(tmp_path, paint, write_tiff):
    path = write_tiff(tmp_path / "a.tiff", paint(), mpp=None)
    with pytest.raises(UserError, match="µm/px"):
        OpenSlideReader(path)
    with open_slide(path, 0.25) as slide:
        assert slide.level_mpps == pytest.approx((0.25, 0.5, 1.0))


def test_unreadable_and_truncated_files_are_user_errors(tmp_path, paint, write_tiff):
    whole = write_tiff(tmp_path / "a.tiff", paint())
    (tmp_path / "cut.tiff").write_bytes(whole.read_bytes()[:20_000])
    (tmp_path / "text.svs").write_text("not a slide")
    for name in ("cut.tiff", "text.svs", "absent.svs"):
        with pytest.raises(UserError, match="cannot be read"):
            OpenSlideReader(tmp_path / name)


def test_resize_averages_areas_and_leaves_equal_sizes_alone():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert resize(image, 64, 64) is image
    blocks = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(resize(image, 16, 16) - blocks).max() <= 0.5


def test_scaled_reading_in_blocks_is_the_whole_slide_averaged(
    tmp_path, paint, write_tiff, monkeypatch
):
    image = paint()
    with open_slide(write_tiff(tmp_path / "a.tiff", image, levels=1)) as slide:
        monkeypatch.setattr("pathme_jax.slides.reader.BLOCK_PX", 700)
        whole = read_scaled(slide, 5.0)
    expected = cv2.resize(image, (110, 110), interpolation=cv2.INTER_AREA)
    assert whole.shape == (110, 110, 3)
    assert np.abs(whole.astype(int) - expected).max() <= 1
