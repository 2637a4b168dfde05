"""The grid does not drift, fields abut and lie inside, and tissue shares are exact."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathme_jax.slides.grid import SPAN, Grid, cover, tile_cells

grids = st.builds(
    Grid,
    size=st.tuples(st.integers(1, 60_000), st.integers(1, 60_000)),
    slide_mpp=st.floats(0.1, 2.0),
    mpp=st.sampled_from([0.25, 0.44, 0.5, 1.0, 2.0]),
    field_px=st.sampled_from([128, 896, 1024]),
)


@given(grids)
def test_fields_abut_lie_inside_and_never_drift(grid):
    rows, cols = grid.shape
    width, height = grid.size
    exact = grid.field_um / grid.slide_mpp
    edge = 0
    for col in range(cols):
        x, y, w, _ = grid.box(0, col, mpp=grid.slide_mpp)
        assert (x, y) == (edge, 0)
        assert abs(x - col * exact) <= 0.5
        edge = x + w
    assert edge <= width
    assert round((cols + 1) * exact) > width, "one more would have fitted"
    if rows and cols:
        _, y, _, h = grid.box(rows - 1, 0, mpp=grid.slide_mpp)
        assert y + h <= height


def test_the_real_slides_grid():
    """8320 px at 0.5044 µm/px: 8 × 8 fields of 1015.07 px, the last starting 0.5 px off at most."""
    grid = Grid((8320, 8320), 0.5044, 0.5, 1024)
    assert grid.shape == (8, 8)
    assert grid.box(0, 7, mpp=0.5044)[0] == round(7 * 512 / 0.5044) == 7105
    assert 7 * 1015 == 7105 and grid.box(0, 6, span=2, mpp=0.5044)[2] == 8121 - 6090


def test_exact_mpp_gives_whole_pixels():
    grid = Grid((4096, 4096), 0.49999999, 0.5, 1024)  # as a float32 resolution tag reads back
    assert grid.shape == (4, 4)
    assert grid.box(2, 3, mpp=grid.slide_mpp) == (3072, 2048, 1024, 1024)
    assert grid.box(0, 0, span=4, mpp=8.0) == (0, 0, 256, 256)


@given(grids, st.integers(0, 40), st.integers(0, 40))
def test_a_fields_first_tile_starts_where_the_field_starts(grid, row, col):
    cells = tile_cells(np.array([[row, col]]), np.eye(SPAN, dtype=bool)[None])
    x, y, *_ = grid.box(row, col, mpp=grid.slide_mpp)
    assert grid.tile_coords(cells)[0].tolist() == [x, y]
    assert cells.tolist() == [[row * SPAN + i, col * SPAN + i] for i in range(SPAN)]


def test_tiles_come_field_by_field_and_none_is_no_row():
    tissue = np.zeros((2, SPAN, SPAN), bool)
    assert tile_cells(np.array([[0, 0], [0, 1]]), tissue).shape == (0, 2)
    tissue[0, 3, 0] = tissue[1, 0, 2] = True
    assert tile_cells(np.array([[0, 0], [0, 1]]), tissue).tolist() == [[3, 0], [0, 6]]


def test_regions_lie_on_the_lattice_inside_and_hold_a_stored_field():
    grid = Grid((1, 1), 1.0, 1.0, 4)
    stored = np.zeros((9, 6), bool)
    stored[5, 2] = stored[0, 5] = True
    assert grid.regions(stored, 4) == [(4, 0)]
    assert grid.regions(stored, 2) == [(0, 2), (2, 0), (2, 2), (4, 0), (4, 2)]
    assert grid.regions(stored[:3], 1) == []


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from([3, 4, 5, 7])
)
def test_cover_counts_straddling_pixels_by_their_part(height, width, seed, cell):
    """Against the mask enlarged so that every border falls on a pixel."""
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    fine = mask.repeat(cell, 0).repeat(cell, 1)  # a mask pixel is `cell` fine pixels wide
    shape = (3, 4)
    padded = np.zeros((shape[0] * 2 * cell, shape[1] * 2 * cell))
    part = fine[: padded.shape[0], : padded.shape[1]]
    padded[: part.shape[0], : part.shape[1]] = part
    # cells of 2·cell fine pixels at a mask pixel of `cell`: 2 pixels; then the odd case 1.5
    assert np.allclose(
        cover(mask, 1.0, 2.0, shape),
        padded.reshape(shape[0], 2 * cell, shape[1], 2 * cell).mean((1, 3)),
    )


def test_cover_of_cells_that_no_pixel_border_meets():
    mask = np.array([[1, 0], [0, 0]], bool)
    share = cover(mask, 8.0, 12.0, (2, 2))
    assert share == pytest.approx(np.array([[64 / 144, 0], [0, 0]]))
    share = cover(np.ones((3, 3), bool), 8.0, 10.0, (3, 3))
    assert share[:2, :2] == pytest.approx(1) and share[2, 2] == pytest.approx(0.16)
