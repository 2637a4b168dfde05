"""Pictures of a slide to look at: its tissue outline, its fields and regions."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from pathme_jax.files import atomic
from pathme_jax.slides.grid import SPAN, Grid
from pathme_jax.slides.tissue import Polygons

GREEN, BLUE, RED = (0, 140, 60), (30, 60, 220), (220, 40, 40)


def save(path: Path, picture: np.ndarray) -> None:
    """Writes (h, w, 3) uint8 RGB as JPEG."""
    with atomic(path) as temporary:
        temporary.write_bytes(
            simplejpeg.encode_jpeg(np.ascontiguousarray(picture), 88, "RGB", "420")
        )


def load(path: Path) -> np.ndarray:
    return simplejpeg.decode_jpeg(path.read_bytes(), "RGB")


def draw_outlines(thumbnail: np.ndarray, polygons: Polygons, scale: float) -> np.ndarray:
    """The thumbnail with tissue in green and its holes in blue; `scale`: level-0 to thumbnail."""
    picture = thumbnail.copy()
    width = max(1, max(picture.shape) // 400)
    for outer, *holes in polygons:
        cv2.polylines(picture, _pixels([outer], scale), True, GREEN, width, cv2.LINE_AA)
        cv2.polylines(picture, _pixels(holes, scale), True, BLUE, width, cv2.LINE_AA)
    return picture


def _pixels(rings: list[np.ndarray], scale: float) -> list[np.ndarray]:
    return [np.round(ring * scale).astype(np.int32) for ring in rings]


def draw_grid(
    thumbnail: np.ndarray,
    thumbnail_mpp: float,
    grid: Grid,
    fields: np.ndarray,
    tissue: np.ndarray,
    regions: list[tuple[int, int]],
) -> np.ndarray:
    """The thumbnail with stored fields in green, their tissue tiles tinted, regions outlined in red.

    Args:
        fields: (n, 2) row, column.
        tissue: (n, SPAN, SPAN) bool.
        regions: row, column of each region's first field.
    """
    picture = thumbnail.copy()
    tint = picture.copy()
    tile_px = grid.tile_um / thumbnail_mpp
    for (row, col), tiles in zip(fields.tolist(), tissue, strict=True):
        for r, c in np.argwhere(tiles):
            corners = _corners(row * SPAN + r, col * SPAN + c, 1, tile_px)
            cv2.rectangle(tint, *corners, GREEN, -1)
    picture = cv2.addWeighted(tint, 0.15, picture, 0.85, 0)
    for row, col in fields.tolist():
        cv2.rectangle(picture, *_corners(row, col, 1, tile_px * SPAN), GREEN, 1)
    for row, col in regions:
        cv2.rectangle(picture, *_corners(row, col, SPAN, tile_px * SPAN), RED, 2)
    return picture


def _corners(row: int, col: int, span: int, px: float) -> tuple[tuple[int, int], tuple[int, int]]:
    return (round(col * px), round(row * px)), (
        round((col + span) * px) - 1,
        round((row + span) * px) - 1,
    )
