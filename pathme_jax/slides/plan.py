"""The recipe of a tiling, and what it means for one slide: which fields and regions to store."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.files import digest
from pathme_jax.records import features, fields
from pathme_jax.slides import tissue
from pathme_jax.slides.grid import SPAN, Grid, cover
from pathme_jax.slides.reader import Reader


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the fields of a slide; its digest names their folder.

    Attributes:
        mpp: µm per pixel of a field.
        field_px, tile_px: sides of a field and of its SPAN × SPAN tiles.
        region_stride: fields from one region to the next.
        min_tissue: share of a tile that must be tissue.
        max_upsample: how far the finest level may be enlarged to reach `mpp`.
    """

    mpp: float = 0.5
    field_px: int = 1024
    tile_px: int = 256
    region_stride: int = 4
    min_tissue: float = 0.25
    max_upsample: float = 1.05

    def check(self) -> None:
        """Raises UserError on a value that cannot be served."""
        for name, good, expected in (
            ("mpp", 0.05 <= self.mpp <= 20, "0.05 to 20 µm per pixel"),
            ("tile-px", self.tile_px > 0, "a positive number"),
            ("field-px", self.field_px == SPAN * self.tile_px, f"{SPAN} × --tile-px"),
            ("region-stride", self.region_stride >= 1, "1 or more fields"),
            ("min-tissue", 0 < self.min_tissue <= 1, "a share above 0, at most 1"),
            ("max-upsample", 1 <= self.max_upsample <= 2, "1 to 2"),
        ):
            if not good:
                value = getattr(self, name.replace("-", "_"))
                raise UserError(f"--{name} {value:g}: expected {expected}", "Correct it")

    def content(self) -> dict[str, Any]:
        jpeg = {"quality": fields.QUALITY, "subsampling": fields.SUBSAMPLING}
        recipe = dataclasses.asdict(self)
        return {**recipe, "jpeg": jpeg, "schema": fields.SCHEMA, "tissue": tissue.RECIPE}

    @property
    def hash8(self) -> str:
        return digest(self.content())

    @property
    def folder(self) -> str:
        return features.grid_name(self.mpp, self.content())


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to read from a slide.

    Attributes:
        level: of the slide, to read fields from.
        fields: (n, 2) int32 row, column of the fields with a tissue tile.
        tissue: (n, SPAN, SPAN) bool, their tissue tiles.
        regions: row, column of each region's first field.
    """

    grid: Grid
    level: int
    fields: np.ndarray
    tissue: np.ndarray
    regions: list[tuple[int, int]]

    def stored(self) -> np.ndarray:
        """(rows, columns) bool: the fields that are stored."""
        stored = np.zeros(self.grid.shape, bool)
        stored[tuple(self.fields.T)] = True
        return stored


def make_plan(slide: Reader, level: int, polygons: tissue.Polygons, recipe: Recipe) -> Plan:
    """Which fields and regions of a slide to store.

    Raises:
        UserError: no tissue, or the slide is smaller than a field, or no whole field holds tissue.
    """
    size = slide.level_sizes[0]
    grid = Grid(size, slide.mpp, recipe.mpp, recipe.field_px)
    extent = "{:.0f} × {:.0f} µm".format(*(side * slide.mpp for side in size))
    if 0 in grid.shape:
        raise UserError(
            f"smaller than a field: {extent}, a field is {grid.field_um:g} µm wide",
            "Tile it at a smaller --mpp, or with smaller --field-px and --tile-px",
        )
    mask = tissue.rasterise(polygons, size, slide.mpp)
    if not mask.any():
        raise UserError(
            "no tissue found",
            "Draw it in contours_geojson with QuPath, or bring outlines in with --tissue DIR",
        )
    rows, cols = grid.shape
    share = cover(mask, tissue.RECIPE["mpp"], grid.tile_um, (rows * SPAN, cols * SPAN))
    tiles = (share >= recipe.min_tissue).reshape(rows, SPAN, cols, SPAN).swapaxes(1, 2)
    stored = np.any(tiles, axis=(2, 3))
    if not stored.any():
        raise UserError(
            f"no tile within a whole field of the {rows} × {cols} is {recipe.min_tissue:g} tissue",
            "Lower --min-tissue, or correct the outlines in contours_geojson with QuPath",
        )
    cells = np.argwhere(stored).astype(np.int32)
    return Plan(grid, level, cells, tiles[stored], grid.regions(stored, recipe.region_stride))


def missing_regions(plan: Plan) -> tuple[str, str]:
    """Why a slide has no region, and what to do; empty where it has."""
    if plan.regions:
        return "", ""
    side = SPAN * plan.grid.field_um
    extent = "{:.0f} × {:.0f} µm".format(*(s * plan.grid.slide_mpp for s in plan.grid.size))
    if min(plan.grid.shape) < SPAN:
        reason = f"smaller than a region ({extent}, a region is {side:g} µm): tile features only"
        return reason, "Nothing to do, unless a smaller --mpp makes sense"
    return "no whole region holds tissue: tile features only", "Try a smaller --region-stride"
