"""Attention as tiles that QuPath reads: drag the file onto the open slide, or File > Import objects."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np

from pathme_jax.files import atomic
from pathme_jax.reports.figures import ranks

STEPS = 10  # classes of attention: QuPath colours by class at once, by measurement when asked to


def write(path: Path, coords: np.ndarray, attention: np.ndarray, side: float) -> None:
    """A FeatureCollection of squares in level-0 pixels, as QuPath 0.4 and later have them.

    Args:
        coords: (m, 2) x, y of the upper left corners; attention: (m,); side: of a tile.
    """
    rank = ranks(attention)
    step = np.minimum((rank * STEPS).astype(int), STEPS - 1)
    colours = matplotlib.colormaps["plasma"](np.arange(STEPS) / (STEPS - 1), bytes=True)
    features = [
        _tile(corner, side, (i + 1, colours[i][:3].tolist()), value, r)
        for corner, i, value, r in zip(
            coords.tolist(), step.tolist(), attention.tolist(), rank.tolist(), strict=True
        )
    ]
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}) + "\n")


def _tile(
    corner: list[float], side: float, step: tuple[int, list[int]], attention: float, rank: float
) -> dict:
    x, y = corner
    right, bottom = x + side, y + side
    number, colour = step
    end = {1: " (least)", STEPS: " (most)"}.get(number, "")
    return {
        "type": "Feature",
        "geometry": {
            "type": "Polygon",
            "coordinates": [[[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]],
        },
        "properties": {
            "objectType": "tile",
            "name": f"attention rank {rank:.2f}",
            "classification": {"name": f"Attention {number:02d}{end}", "color": colour},
            "measurements": {"attention": attention, "attention rank": round(rank, 4)},
        },
    }
