"""Pyramidal TIFFs that OpenSlide opens, written as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import tifffile

from pathme_jax.files import atomic

TILE = 256  # px
SMALLEST = 256  # px: no level has a shorter side
QUALITY = 92  # of the JPEG tiles


def write_pyramid(path: str | Path, rows: Iterable[np.ndarray], size: int, mpp: float) -> None:
    """Writes a square slide, renamed to `path` when complete.

    Each level is the exact 2x2 mean of the one before. Coarser levels wait in memory as JPEG, so that
    besides them only one element of `rows` is held.

    Args:
        path: the .tiff file.
        rows: the slide from top to bottom in pieces (1024, size, 3) uint8.
        size: side in px, a multiple of 1024.
        mpp: µm per px.
    """
    sides = [size]
    while sides[-1] // 2 >= SMALLEST:
        sides.append(sides[-1] // 2)
    coarser: list[list[bytes]] = [[] for _ in sides[1:]]
    with (
        atomic(path) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=size * size * 3 >= 2**32) as tiff,
    ):
        finest = _encode_levels(rows, size, coarser)
        for level, (side, tiles) in enumerate(zip(sides, [finest, *coarser], strict=True)):
            per_cm = 1e4 / (mpp * size / side)
            tiff.write(
                iter(tiles),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",  # tifffile tags JPEG tiles of RGB images YCbCr, as they are
                compression="jpeg",
                subsampling=(2, 2),
                subfiletype=int(level > 0),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
                software="pathme_jax",
            )


def _encode_levels(
    rows: Iterable[np.ndarray], size: int, coarser: list[list[bytes]]
) -> Iterator[bytes]:
    """Yields the JPEG tiles of level 0; before its last one, `coarser` holds all other levels'."""
    waiting: list[list[np.ndarray]] = [[] for _ in coarser]  # fewer rows than make a tile
    done = 0
    for image in rows:
        done += len(image)
        half = image
        for tiles, part in zip(coarser, waiting, strict=True):
            half = cv2.resize(half, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            part.append(half)
            if sum(map(len, part)) >= TILE or done == size:
                tiles.extend(_encode(np.concatenate(part)))
                part.clear()
        yield from _encode(image)


def _encode(image: np.ndarray) -> Iterator[bytes]:
    """JPEG tiles of an image in row order, those on the lower and right edges padded."""
    height, width = image.shape[:2]
    image = np.pad(image, ((0, -height % TILE), (0, -width % TILE), (0, 0)), mode="edge")
    for y in range(0, height, TILE):
        for x in range(0, width, TILE):
            tile = np.ascontiguousarray(image[y : y + TILE, x : x + TILE])
            yield simplejpeg.encode_jpeg(tile, quality=QUALITY, colorsubsampling="420")
