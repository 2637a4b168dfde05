"""The field grid of a slide: arithmetic on micrometres, no pixels.

The grid starts at level-0 (0, 0). A cell is a square of `cell_um`; its borders are rounded to pixels
singly, so no error builds up along the slide and neighbours share a border.
"""

from __future__ import annotations

import dataclasses

import numpy as np

SPAN = 4  # tiles along a field, and fields along a region


@dataclasses.dataclass(frozen=True)
class Grid:
    """Fields of a slide.

    Attributes:
        size: level-0 (width, height) in pixels.
        slide_mpp: µm per level-0 pixel.
        mpp: µm per pixel of a stored field.
        field_px: pixels along a field; a region has SPAN fields along a side, a field SPAN tiles.
    """

    size: tuple[int, int]
    slide_mpp: float
    mpp: float
    field_px: int

    @property
    def field_um(self) -> float:
        return self.field_px * self.mpp

    @property
    def tile_um(self) -> float:
        return self.field_um / SPAN

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of fields wholly inside the slide, borders rounded."""
        width, height = self.size
        return self._whole(height), self._whole(width)

    def _whole(self, pixels: int) -> int:
        count = int(pixels * self.slide_mpp / self.field_um) + 1
        while count and round(count * self.field_um / self.slide_mpp) > pixels:
            count -= 1
        return count

    def box(self, row: int, col: int, *, span: int = 1, mpp: float) -> tuple[int, int, int, int]:
        """x, y, width, height of `span` fields at (row, col) in pixels of `mpp` µm."""
        x, y, right, bottom = (
            round(n * self.field_um / mpp) for n in (col, row, col + span, row + span)
        )
        return x, y, right - x, bottom - y

    def regions(self, stored: np.ndarray, stride: int) -> list[tuple[int, int]]:
        """(row, col) of the regions on the lattice that hold a stored field.

        Args:
            stored: (rows, columns) bool.
            stride: fields from one region to the next.
        """
        rows, cols = stored.shape
        return [
            (row, col)
            for row in range(0, rows - SPAN + 1, stride)
            for col in range(0, cols - SPAN + 1, stride)
            if stored[row : row + SPAN, col : col + SPAN].any()
        ]

    def tile_coords(self, tiles: np.ndarray) -> np.ndarray:
        """(n, 2) int64 level-0 x, y of the tiles at (n, 2) row, column of the tile grid."""
        return np.round(tiles[:, ::-1] * self.tile_um / self.slide_mpp).astype(np.int64)


def tile_cells(fields: np.ndarray, tissue: np.ndarray) -> np.ndarray:
    """Row, column on the tile grid of each tissue tile, field by field, row by row within a field.

    Args:
        fields: (n, 2) row, column of each field.
        tissue: (n, SPAN, SPAN) bool.

    Returns:
        (tiles, 2) int32.
    """
    field, row, col = np.nonzero(tissue)
    return (fields[field] * SPAN + np.stack([row, col], 1)).astype(np.int32).reshape(-1, 2)


def cover(mask: np.ndarray, mask_um: float, cell_um: float, shape: tuple[int, int]) -> np.ndarray:
    """The share of each cell of a grid that the mask covers, exact also where pixels straddle cells.

    Args:
        mask: (h, w) bool with pixels of `mask_um`, from the same origin.
        cell_um: side of a cell.
        shape: (rows, columns) of cells.

    Returns:
        (rows, columns) float64 in [0, 1]; outside the mask nothing is covered.
    """
    total = np.pad(mask.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    for axis, cells in enumerate(shape):
        border = np.minimum(np.arange(cells + 1) * (cell_um / mask_um), total.shape[axis] - 1)
        low = np.minimum(border.astype(int), total.shape[axis] - 2)
        part = np.expand_dims(border - low, 1 - axis)
        below, above = np.take(total, low, axis), np.take(total, low + 1, axis)
        total = np.diff(below + part * (above - below), axis=axis)
        if axis == 0:  # the second axis still is a running sum, its leading zero kept
            continue
    return total * (mask_um / cell_um) ** 2
