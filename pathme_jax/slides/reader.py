"""Opening a whole slide and reading pixels of one level. OpenSlide is the reference.

Another library can be slotted in behind `Reader`; it must agree with OpenSlide to the pixel.
Errors say what is wrong with a slide and how to cure it; whoever shows them names the slide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import openslide

from pathme_jax.errors import UserError

# Decoded tiles kept per open slide, so that neighbouring fields do not decode shared tiles twice.
CACHE_BYTES = 128 << 20
BLOCK_PX = 4096  # most pixels along a side that are read at once for an overview
PLAUSIBLE_MPP = (0.05, 20.0)


class Reader(Protocol):
    """One open slide. Coordinates are pixels of the level read; sizes are (width, height)."""

    mpp: float  # µm per level-0 pixel
    level_sizes: tuple[tuple[int, int], ...]
    level_mpps: tuple[float, ...]

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB, white outside the slide."""
        ...


class OpenSlideReader:
    """Reads what OpenSlide reads.

    Args:
        path: the slide.
        mpp: µm per level-0 pixel, overriding the file's own.

    Raises:
        UserError: unreadable, or its µm/px is missing or implausible.
    """

    def __init__(self, path: str | Path, mpp: float | None = None):
        try:
            self._slide = openslide.OpenSlide(str(path))
        except (openslide.OpenSlideError, OSError) as error:
            raise _unreadable(error) from error
        self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        self.mpp = slide_mpp(self._slide.properties) if mpp is None else mpp
        self.level_sizes = tuple(self._slide.level_dimensions)
        self.level_mpps = tuple(self.mpp * ratio for ratio in self._slide.level_downsamples)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        ratio = self._slide.level_downsamples[level]
        corner = round(x * ratio), round(y * ratio)
        try:
            rgba = np.asarray(self._slide.read_region(corner, level, (width, height)))
        except openslide.OpenSlideError as error:
            raise _unreadable(error) from error
        rgb = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
        alpha = rgba[..., 3]
        if alpha.min() < 255:  # outside the slide, or never scanned
            rgb[alpha < 255] = 255
        return rgb

    def close(self) -> None:
        self._slide.close()


def _unreadable(error: Exception) -> UserError:
    return UserError(
        f"cannot be read ({type(error).__name__}: {error})",
        "Copy it again from its source, or convert it to a pyramidal TIFF",
    )


@contextlib.contextmanager
def open_slide(path: str | Path, mpp: float | None = None) -> Iterator[Reader]:
    """Opens a slide and closes it after; see `OpenSlideReader`."""
    slide = OpenSlideReader(path, mpp)
    try:
        yield slide
    finally:
        slide.close()


def slide_mpp(properties: Mapping[str, str]) -> float:
    """µm per level-0 pixel from a slide's properties, by the first key that the file has.

    Raises:
        UserError: no key, or a value that no microscope gives (72 dpi left by an image editor).
    """
    found = _stated_mpp(properties)
    cure = "Give its µm/px with --mpp-csv FILE (columns: wsi,mpp)"
    if found is None:
        raise UserError("the file does not state its µm/px (mpp)", cure)
    key, mpp = found
    low, high = PLAUSIBLE_MPP
    if not low <= mpp <= high:  # also catches NaN
        raise UserError(
            f"{key} gives {mpp:g} µm/px, expected {low:g} to {high:g}",
            cure,
        )
    return mpp


def _stated_mpp(properties: Mapping[str, str]) -> tuple[str, float] | None:
    for key in ("openslide.mpp-x", "aperio.MPP", "hamamatsu.mpp-x"):
        if key in properties:
            return key, _number(properties[key])
    um_per_unit = {"centimeter": 1e4, "inch": 25400.0}.get(
        properties.get("tiff.ResolutionUnit", "")
    )
    per_unit = _number(properties.get("tiff.XResolution", ""))
    if um_per_unit is None or not per_unit > 0:
        return None
    return "tiff.XResolution", um_per_unit / per_unit


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def level_for(slide: Reader, mpp: float, max_upsample: float) -> int:
    """The coarsest level not coarser than `mpp * max_upsample`.

    Raises:
        UserError: even the finest level is coarser: the slide is too coarse.
    """
    fit = [i for i, level in enumerate(slide.level_mpps) if level <= mpp * max_upsample]
    if not fit:
        servable = 0.5
        while slide.mpp > servable * max_upsample:
            servable *= 2
        raise UserError(
            f"too coarse: its finest level has {slide.mpp:.4g} µm/px, {mpp:g} was asked for "
            f"and at most {mpp * max_upsample:.4g} is enlarged",
            f"Tile it with --mpp {servable:g}",
        )
    return max(fit, key=lambda i: slide.level_mpps[i])


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Area average when shrinking, bicubic when enlarging, the very pixels when neither."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=method)


def read_scaled(slide: Reader, mpp: float) -> np.ndarray:
    """The whole slide at `mpp`, (height, width, 3) uint8, read in blocks so that memory stays small.

    Unlike fields it may be enlarged without limit: it only serves to look at and to find tissue.
    """
    level = max(
        (i for i, m in enumerate(slide.level_mpps) if m <= mpp * 1.05),
        key=lambda i: slide.level_mpps[i],
        default=0,
    )
    width, height = (max(1, round(size * slide.mpp / mpp)) for size in slide.level_sizes[0])
    xs, ys = (
        np.round(np.linspace(0, size, n + 1)).astype(int).tolist()
        for n, size in zip((width, height), slide.level_sizes[level], strict=True)
    )
    out = np.empty((height, width, 3), np.uint8)
    block = max(64, int(BLOCK_PX * slide.level_mpps[level] / mpp))
    for top in range(0, height, block):
        for left in range(0, width, block):
            bottom, right = min(top + block, height), min(left + block, width)
            x, y = xs[left], ys[top]
            pixels = slide.read(level, x, y, max(1, xs[right] - x), max(1, ys[bottom] - y))
            out[top:bottom, left:right] = resize(pixels, right - left, bottom - top)
    return out
