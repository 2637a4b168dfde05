"""Tiles of two-scale tissue: 256 px (128 µm) of gland or of stroma, in a slide's own stain and scanner.

A tile is drawn as concentrations of hematoxylin and eosin, turned into colour by Beer-Lambert's law,
and given sensor noise; chromatin is added later. Nothing drawn in a tile crosses its border, where all
tiles of one slide fade into the same periodic texture: tiles may stand in any order without a seam.
"""

from __future__ import annotations

import dataclasses
import functools

import cv2
import numpy as np

from pathme_jax.synthetic.chromatin import AMPLITUDE, BLOCK

TILE = 256  # px
GLAND, STROMA = 0, 1  # the two kinds of tile
BORDER = 14  # px over which a tile's own texture fades into the slide's common one
ANGLES = 8  # fibre directions, over half a turn
EOSIN = 0.52  # mean concentration in stroma

# Optical density per unit of hematoxylin and of eosin in R, G, B (Macenko's reference vectors).
STAINS = np.array([[0.563, 0.720, 0.406], [0.216, 0.801, 0.558]])


@dataclasses.dataclass
class Look:
    """What makes a slide look like itself whatever it shows: stains, scanner, fibres.

    Attributes:
        stains: (2, 3) optical density per unit of hematoxylin, eosin; holds strength and gamma too.
        white, black: (3,) colour of glass and of full absorption, 0-255.
        noise: standard deviation of the sensor noise, grey levels.
        fibres: (ANGLES, 512, 512) texture of unit variance, one plane per fibre direction.
        seam: (256, 256) periodic texture of unit variance that all tiles share at their borders.
    """

    stains: np.ndarray
    white: np.ndarray
    black: np.ndarray
    noise: float
    fibres: np.ndarray
    seam: np.ndarray

    def colour(self, hematoxylin: np.ndarray, eosin: np.ndarray) -> np.ndarray:
        """Concentrations (h, w) to colour (h, w, 3), float32."""
        channels = []
        for (h, e), white, black in zip(self.stains.T, self.white, self.black, strict=True):
            density = hematoxylin * -h
            density -= eosin * e
            np.exp(density, out=density)
            density *= white - black
            density += black
            channels.append(density)
        return cv2.merge(channels)


def draw_look(rng: np.random.Generator) -> Look:
    """Draws a slide's stain vectors and strengths, scanner (gain, white balance, gamma), fibres."""
    stains = STAINS * np.exp(rng.normal(0, 0.08, STAINS.shape))
    strength = np.exp(rng.normal(0, 0.13, (2, 1)))  # section thickness, staining time
    gamma = np.exp(rng.normal(0, 0.08))
    white = np.clip(rng.uniform(228, 246) + rng.normal(0, 2.5, 3), 215, 250)
    black = rng.uniform(8, 24) + rng.uniform(0, 8, 3)
    periodic = cv2.GaussianBlur(np.tile(_noise(rng, TILE), (2, 2)), (0, 0), 2.5)
    return Look(
        stains=(stains * strength * gamma).astype(np.float32),
        white=white.astype(np.float32),
        black=black.astype(np.float32),
        noise=rng.uniform(1.5, 3.0),
        fibres=_fibres(rng),
        seam=_unit(periodic[TILE // 2 : -TILE // 2, TILE // 2 : -TILE // 2]),
    )


@dataclasses.dataclass
class Tile:
    """`base` (256, 256, 3) uint8 without chromatin; `blocks` (64, 64) bool, those inside nuclei."""

    base: np.ndarray
    blocks: np.ndarray


def draw_tile(rng: np.random.Generator, kind: int, look: Look) -> Tile:
    """Draws a tile of `kind` GLAND or STROMA: a pure function of its arguments."""
    plane = int(rng.integers(ANGLES))
    angle = 180 * plane / ANGLES
    y, x = rng.integers(0, look.fibres.shape[1] - TILE, 2)
    own, inside = look.fibres[plane, y : y + TILE, x : x + TILE], _inside()
    eosin = np.clip(EOSIN + 0.12 * (look.seam + inside * (own - look.seam)), 0.08, 1.1)
    hematoxylin = np.full_like(eosin, 0.06)
    nuclei = np.zeros((TILE, TILE), np.uint8)  # hematoxylin inside nuclei, in 1/100
    if kind == GLAND:
        _draw_nuclei(nuclei, _spindles(rng, 14, angle))
        _draw_glands(rng, hematoxylin, eosin, nuclei)
    else:
        _draw_nuclei(nuclei, _spindles(rng, 18, angle))
        _draw_nuclei(nuclei, _lymphocytes(rng, int(rng.integers(2, 6))))
    hematoxylin += cv2.GaussianBlur(nuclei, (0, 0), 0.8).astype(np.float32) / 100
    colour = look.colour(hematoxylin, eosin)
    colour += look.noise * _noise(rng, TILE)[..., None]
    side = TILE // BLOCK
    blocks = nuclei.reshape(side, BLOCK, side, BLOCK).min((1, 3)) > 60
    # Room for the chromatin, and for what JPEG adds to it, so that nothing clips.
    room = np.float32(AMPLITUDE + 8) * blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)[..., None]
    return Tile(np.rint(np.clip(colour, room, 255 - room)).astype(np.uint8), blocks)


def _draw_glands(
    rng: np.random.Generator, hematoxylin: np.ndarray, eosin: np.ndarray, nuclei: np.ndarray
) -> None:
    """Glands of mixed sizes: a pale lumen, epithelium about it, nuclei across the epithelium."""
    outer, wall, lumen, cells = [], [], [], []
    for centre, radius in _pack(rng):
        edge = radius * _wobble(rng)
        depth = min(rng.uniform(26, 42), 0.6 * radius)
        outer.append(_outline(centre, edge + 2.5))
        wall.append(_outline(centre, edge))
        lumen.append(_outline(centre, edge - depth))
        cells.append(_columnar(rng, _outline(centre, edge - 11.5), filled=0.95))
        if depth > 33:
            cells.append(_columnar(rng, _outline(centre, edge - 27), filled=0.7))
    for outlines, h, e, grain in [
        (outer, 0.03, 0.2, 0.3),  # a cleft around each gland
        (wall, 0.2, 0.5, 0.5),
        (lumen, 0.02, 0.06, 0.1),
    ]:
        weight = _fill(outlines).astype(np.float32) / 255
        eosin += weight * (e - EOSIN + (1 - grain) * (EOSIN - eosin))
        hematoxylin += weight * (h - hematoxylin)
    nuclei[_fill(outer) > 0] = 0
    _draw_nuclei(nuclei, np.concatenate(cells))


def _pack(rng: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """Centres (x, y) and radii of circles in the tile that do not touch."""
    placed: list[tuple[np.ndarray, float]] = []
    largest = rng.uniform(45, 110)
    for attempt in range(150):
        radius = largest if attempt == 0 else rng.uniform(31, 60)
        centre = rng.uniform(radius + 5, TILE - radius - 5, 2)
        if all(np.hypot(*(centre - other)) > radius + r + 2 for other, r in placed):
            placed.append((centre, radius))
    return placed


def _wobble(rng: np.random.Generator) -> np.ndarray:
    """(72,) factors on a circle's radius, at most 1."""
    around = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    shape = np.full(72, 0.94)
    for order, size in [(2, 0.09), (3, 0.04), (4, 0.03), (5, 0.02)]:
        shape += rng.normal(0, size) * np.cos(order * around + rng.uniform(0, 2 * np.pi))
    return np.clip(shape, 0.7, 1.0)


def _outline(centre: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """(72, 2) x, y of the closed line at distances `edge` (72,) from `centre`."""
    around = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return centre + np.maximum(edge, 3)[:, None] * np.stack([np.cos(around), np.sin(around)], 1)


def _columnar(rng: np.random.Generator, ring: np.ndarray, filled: float) -> np.ndarray:
    """Nuclei side by side along a closed `ring` (72, 2), their long axes across it."""
    step = np.roll(ring, -1, 0) - np.roll(ring, 1, 0)
    position = np.concatenate([[0], np.cumsum(np.hypot(*step.T))]) / 2
    spacing = rng.uniform(15, 18)
    at = np.arange(0, position[-1] - spacing / 2, spacing)
    at = at[rng.random(len(at)) < filled]
    nearest = np.searchsorted(position, at + rng.normal(0, 1.5, len(at))) % len(ring)
    count = len(at)
    angle = (
        np.degrees(np.arctan2(step[nearest, 1], step[nearest, 0])) + 90 + rng.normal(0, 9, count)
    )
    spot = ring[nearest] + rng.normal(0, 1.5, (count, 2))
    long, short, dark = rng.uniform([8.5, 5.8, 95], [12, 7.6, 150], (count, 3)).T
    return np.column_stack([spot, long, short, angle, dark])


def _spindles(rng: np.random.Generator, count: int, angle: float) -> np.ndarray:
    """Fibroblasts: long nuclei along the fibres."""
    x, y, long, short, dark = rng.uniform(
        [0, 0, 9, 3.2, 100], [TILE, TILE, 16, 4.8, 160], (count, 5)
    ).T
    return np.column_stack([x, y, long, short, angle + rng.normal(0, 12, count), dark])


def _lymphocytes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Small, round, dark nuclei."""
    x, y, radius, dark = rng.uniform([0, 0, 6, 150], [TILE, TILE, 7.5, 190], (count, 4)).T
    return np.column_stack([x, y, radius, radius, np.zeros(count), dark])


def _draw_nuclei(nuclei: np.ndarray, ellipses: np.ndarray) -> None:
    """Draws rows of x, y, long and short half axis in px, angle in degrees, darkness in 1/100."""
    reach = ellipses[:, 2:3] + 2
    ellipses[:, :2] = np.clip(ellipses[:, :2], reach, TILE - reach)  # none crosses the border
    for x, y, long, short, angle, dark in ellipses.tolist():
        place = (int(16 * x), int(16 * y)), (int(16 * long), int(16 * short)), angle, 0, 360
        cv2.ellipse(nuclei, *place, dark, cv2.FILLED, cv2.LINE_AA, 4)
        cv2.ellipse(nuclei, *place, 1.25 * dark, 1, cv2.LINE_AA, 4)  # the membrane


def _fill(outlines: list[np.ndarray]) -> np.ndarray:
    """(256, 256) uint8, 255 inside any of the closed outlines (n, 2) of x, y."""
    layer = np.zeros((TILE, TILE), np.uint8)
    fixed = [np.rint(16 * outline).astype(np.int32) for outline in outlines]
    cv2.fillPoly(layer, fixed, 255, cv2.LINE_AA, 4)
    return layer


def _fibres(rng: np.random.Generator) -> np.ndarray:
    """(ANGLES, 512, 512) float32: wavy streaks, turned by 180 / ANGLES degrees from plane to plane."""
    side = 512
    streaks = _unit(cv2.GaussianBlur(_noise(rng, side), (0, 0), sigmaX=15, sigmaY=1.4))
    streaks += 0.8 * _unit(cv2.GaussianBlur(_noise(rng, side), (0, 0), 2))
    y, x = np.mgrid[:side, :side].astype(np.float32)
    planes = []
    for plane in range(ANGLES):
        turn = cv2.getRotationMatrix2D((side / 2, side / 2), 180 * plane / ANGLES, 1)
        (a, b, c), (d, e, f) = turn.tolist()
        wave = 8 * cv2.resize(_noise(rng, 9), (side, side), interpolation=cv2.INTER_CUBIC)
        along, across = a * x + b * y + c, d * x + e * y + f + wave
        turned = cv2.remap(streaks, along, across, cv2.INTER_LINEAR, None, cv2.BORDER_REFLECT)
        planes.append(_unit(turned))
    return np.stack(planes)


@functools.cache
def _inside() -> np.ndarray:
    """(256, 256) float32: 0 on the tile's border, 1 from BORDER px inwards."""
    ramp = np.clip(np.minimum(np.arange(TILE), np.arange(TILE)[::-1]) / BORDER, 0, 1)
    return np.minimum.outer(ramp, ramp).astype(np.float32)


def _noise(rng: np.random.Generator, side: int) -> np.ndarray:
    return rng.standard_normal((side, side), np.float32)


def _unit(texture: np.ndarray) -> np.ndarray:
    return (texture - texture.mean()) / texture.std()
