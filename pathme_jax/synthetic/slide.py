"""One slide of two-scale tissue: where tissue lies, how tiles are arranged, chromatin on top.

    field  1024 px = 512 µm, 4x4 tiles; the grid starts at (0, 0) of level 0, at exactly 0.5 µm/px
    architecture  0: gland tiles fill one half of the field;  1: gland and stroma in a checkerboard
    detail        0: chromatin in threads;  1: in clumps (chromatin.py)

Everything else (stain, scanner, outline, every tile's pixels) follows from `SlideSpec` alone. So twins
that differ in `architecture` hold the same tiles in other places, and twins that differ in `detail`
have the same 5x pixels. Only fields wholly inside the tissue carry `architecture`: one cut by glass,
a hole or pen keeps an arrangement drawn without looking at the labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import cv2
import numpy as np

from pathme_jax.synthetic.chromatin import BLOCK, chromatin
from pathme_jax.synthetic.tiles import GLAND, STROMA, TILE, Look, draw_look, draw_tile

MPP = 0.5  # µm per px at level 0
ACROSS = 4  # tiles across a field
FIELD = ACROSS * TILE  # px
TISSUE_FIELDS = 0.65  # share of a slide's fields that are tissue
CELL = 16  # px: resolution of the outlines
PENS = np.array([[0.25, 0.35, 0.75], [0.2, 0.6, 0.35], [0.25, 0.25, 0.28]], np.float32)
# Streams of random numbers: the first number after the slide's seed.
_LOOK, _OUTLINE, _TILE, _CHROMATIN, _ARRANGEMENT, _GLASS = range(6)

# Where glands stand in a field, by architecture; each set is closed under flips and quarter turns.
_half = np.arange(ACROSS) < ACROSS // 2
_left = np.broadcast_to(_half, (ACROSS, ACROSS))
_checker = np.indices((ACROSS, ACROSS)).sum(0) % 2 == 0
ARRANGEMENTS = {0: (_left, ~_left, _left.T, ~_left.T), 1: (_checker, ~_checker)}


@dataclasses.dataclass(frozen=True)
class SlideSpec:
    """Seed of a slide's random numbers (any integers >= 0) and its side in px, a multiple of 1024."""

    seed: tuple[int, ...]
    size: int

    def rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, *stream])


@dataclasses.dataclass
class Outline:
    """Where tissue and pen lie on a slide.

    Attributes:
        whole: (rows, columns) bool, the fields wholly inside tissue.
        tissue, pen: (size/16, size/16) float32, px to the edge, positive inside.
        ink: (3,) share of the light that the pen lets through.
    """

    whole: np.ndarray
    tissue: np.ndarray
    pen: np.ndarray
    ink: np.ndarray


def render(spec: SlideSpec, detail: int, architecture: int) -> np.ndarray:
    """The whole slide at level 0: (size, size, 3) uint8."""
    return np.concatenate(list(field_rows(spec, detail, architecture)))


def field_rows(spec: SlideSpec, detail: int, architecture: int) -> Iterator[np.ndarray]:
    """The slide from top to bottom, one row of fields at a time: (1024, size, 3) uint8 each."""
    look, outline = draw_look(spec.rng(_LOOK)), draw_outline(spec)
    for row in range(spec.size // FIELD):
        fields = [
            draw_field(spec, look, outline, (row, column), detail, architecture)
            for column in range(spec.size // FIELD)
        ]
        yield np.concatenate(fields, axis=1)


def draw_field(
    spec: SlideSpec,
    look: Look,
    outline: Outline,
    field: tuple[int, int],
    detail: int,
    architecture: int,
) -> np.ndarray:
    """The field at (row, column) of the grid: (1024, 1024, 3) uint8."""
    tissue = None if outline.whole[field] else _enlarge(outline.tissue, field)
    if tissue is not None and tissue.max() <= 0:
        return _glass(spec, look, outline, field)
    image = np.empty((FIELD, FIELD, 3), np.uint8)
    texture = np.empty((FIELD, FIELD), np.int16)
    glands = _arrangement(spec, field, architecture if tissue is None else None)
    used = {GLAND: 0, STROMA: 0}
    for (i, j), gland in np.ndenumerate(glands):
        kind = GLAND if gland else STROMA
        place = np.s_[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
        name = (*field, kind, used[kind])
        used[kind] += 1
        tile = draw_tile(spec.rng(_TILE, *name), kind, look)
        image[place] = tile.base
        texture[place] = chromatin(spec.rng(_CHROMATIN, *name), tile.blocks, detail)
    if tissue is not None:
        glass = _glass(spec, look, outline, field)
        image = np.rint(glass + tissue[..., None] * (image.astype(np.float32) - glass))
        # Chromatin only in blocks that are tissue throughout: elsewhere it would not sum to zero.
        side = FIELD // BLOCK
        pure = tissue.reshape(side, BLOCK, side, BLOCK).min((1, 3)) == 1
        texture *= pure.repeat(BLOCK, 0).repeat(BLOCK, 1)
    return (image.astype(np.int16) + texture[..., None]).astype(np.uint8)


def _arrangement(spec: SlideSpec, field: tuple[int, int], architecture: int | None) -> np.ndarray:
    """(4, 4) bool, where glands stand; None draws 8 of 16 places at random."""
    rng = spec.rng(_ARRANGEMENT, *field)
    if architecture is None:
        return rng.permutation(ACROSS * ACROSS).reshape(ACROSS, ACROSS) % 2 == 0
    choices = ARRANGEMENTS[architecture]
    return choices[rng.integers(len(choices))]


def _glass(spec: SlideSpec, look: Look, outline: Outline, field: tuple[int, int]) -> np.ndarray:
    """Glass with its pen mark, if any: (1024, 1024, 3) uint8."""
    rng = spec.rng(_GLASS, *field)
    glass = look.white + look.noise * rng.standard_normal((FIELD, FIELD, 1), np.float32)
    pen = _enlarge(outline.pen, field)
    if pen.max() > 0:
        glass *= 1 - pen[..., None] * (1 - outline.ink)
    return np.rint(np.clip(glass, 0, 255)).astype(np.uint8)


def draw_outline(spec: SlideSpec) -> Outline:
    """An irregular piece of tissue about the middle of the slide, with a few holes, perhaps pen."""
    rng = spec.rng(_OUTLINE)
    fields = spec.size // FIELD
    cells = FIELD // CELL
    # The tissue's fields: those nearest the middle, give or take.
    y, x = (np.indices((fields, fields)) + 0.5) / fields - 0.5
    nearness = -np.hypot(y - rng.normal(0, 0.05), x - rng.normal(0, 0.05))
    nearness += 0.12 * _smooth(rng, fields, max(fields // 2, 2))
    count = max(1, round(TISSUE_FIELDS * fields**2))
    whole = nearness >= np.sort(nearness.ravel())[-count]
    # Its edge: a fringe of varying width around them.
    inside = whole.repeat(cells, 0).repeat(cells, 1)
    away = cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, 5) * CELL
    fringe = 210 + 130 * _smooth(rng, len(inside), 3 * fields)
    fringe += 20 * _smooth(rng, len(inside), 24 * fields)
    tissue = np.clip(fringe, 40, 480) - away
    y, x = (np.indices(inside.shape) + 0.5) * CELL
    for row, column in np.argwhere(whole):
        if rng.random() < 0.1 and count > 1:
            dy, dx = (np.array([row, column]) + 0.5) * FIELD + rng.uniform(-150, 150, 2)
            squeeze = rng.uniform(0.6, 1.6)
            hole = np.hypot((y - dy) * squeeze, (x - dx) / squeeze) - rng.uniform(60, 140)
            tissue = np.minimum(tissue, hole + 0.1 * (fringe - 210))
            whole[row, column] = False
    # Pen: along the tissue's edge, on one side of the slide.
    pen = np.full_like(tissue, -CELL)
    if rng.random() < 0.2:
        turn = rng.uniform(0, 2 * np.pi)
        side = (y - spec.size / 2) * np.sin(turn) + (x - spec.size / 2) * np.cos(turn)
        line = np.abs(away + 0.4 * (fringe - 210) - rng.uniform(560, 640))
        pen = np.minimum(rng.uniform(20, 36) - line, side)
    ink = PENS[rng.integers(len(PENS))]
    return Outline(whole, tissue.astype(np.float32), pen.astype(np.float32), ink)


def _smooth(rng: np.random.Generator, side: int, nodes: int) -> np.ndarray:
    """(side, side) smooth noise of about unit variance with `nodes` bumps across."""
    coarse = np.clip(rng.standard_normal((nodes, nodes)), -2, 2).astype(np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def _enlarge(edge: np.ndarray, field: tuple[int, int]) -> np.ndarray:
    """One field of an outline's px-to-the-edge map as coverage (1024, 1024) float32, 0 to 1."""
    shift = [(index * FIELD + 0.5) / CELL - 0.5 for index in field]
    to_map = np.array([[1 / CELL, 0, shift[1]], [0, 1 / CELL, shift[0]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    distance = cv2.warpAffine(
        edge, to_map, (FIELD, FIELD), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
    return np.clip(0.5 + distance / 4, 0, 1)
