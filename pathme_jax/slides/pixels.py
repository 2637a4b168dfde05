"""Pixels of a slide's grid cells, at the exact µm/px: what tiling stores and extraction encodes."""

from __future__ import annotations

import numpy as np

from pathme_jax.slides.grid import SPAN, Grid
from pathme_jax.slides.plan import Plan, Recipe
from pathme_jax.slides.reader import Reader, level_for, resize

VIEW_PX = 256  # side of a stored region view


def field_pixels(slide: Reader, plan: Plan, at: tuple[int, int], recipe: Recipe) -> np.ndarray:
    """The field at row, column: (field_px, field_px, 3) uint8."""
    return _cells(slide, plan.level, plan.grid, at, 1, recipe.field_px)


def view_mpp(recipe: Recipe, px: int = VIEW_PX) -> float:
    """µm per pixel of a region's view of `px` pixels."""
    return recipe.field_px * SPAN / px * recipe.mpp


def view_pixels(
    slide: Reader, plan: Plan, at: tuple[int, int], recipe: Recipe, px: int = VIEW_PX
) -> np.ndarray:
    """The region whose first field is at row, column: (px, px, 3) uint8, from a level that fits."""
    level = level_for(slide, view_mpp(recipe, px), recipe.max_upsample)
    return _cells(slide, level, plan.grid, at, SPAN, px)


def _cells(slide: Reader, level: int, grid: Grid, at: tuple[int, int], span: int, px: int):
    x, y, width, height = grid.box(*at, span=span, mpp=slide.level_mpps[level])
    level_width, level_height = slide.level_sizes[level]
    # A level's size is rounded down: its last pixel may be missing.
    width, height = min(width, level_width - x), min(height, level_height - y)
    return resize(slide.read(level, x, y, width, height), px, px)
