"""Finding tissue on a slide, and keeping it as GeoJSON that QuPath opens, edits and saves.

The outlines belong to the slide, not to a magnification: every `--mpp` shares them. A file that a user
changed or brought in is never overwritten; we know ours by the digest that we leave in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest

# Every number that decides what is tissue. Areas in mm², hue in OpenCV's 0-179, the rest in 0-255.
RECIPE: dict[str, Any] = {
    "version": 1,
    "mpp": 8.0,
    "median_px": 7,  # smooths the saturation: single pixels of dust, JPEG's colour noise
    # Otsu's threshold is kept within: above a blank slide's noise, below pale tissue
    "saturation": [10, 20],
    "close_px": 7,
    "min_tissue": 0.05,  # smaller specks are debris
    "min_hole": 0.02,  # smaller holes are lumina and tears, and stay tissue
    "ink_hue": [35, 118],  # green to blue; haematoxylin begins at about 130
    "ink_saturation": 70,
    "black_below": 90,  # black ink is dark and grey, dense nuclei are dark and purple
    "black_saturation": 60,
    "ink_margin_px": 5,
}

Polygons = list[list[np.ndarray]]  # each: outer ring, then holes; rings are (n, 2) level-0 x, y


def segment(thumbnail: np.ndarray) -> np.ndarray:
    """Which pixels are tissue: saturated (Otsu), closed, without specks and pen marks.

    Args:
        thumbnail: (h, w, 3) uint8 RGB at RECIPE["mpp"] µm/px.

    Returns:
        (h, w) bool.
    """
    r = RECIPE
    hsv = cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)
    hue, saturation, value = (
        cv2.medianBlur(np.ascontiguousarray(hsv[..., i]), r["median_px"]) for i in range(3)
    )
    otsu, _ = cv2.threshold(saturation, 0, 255, cv2.THRESH_OTSU)
    coloured = saturation > np.clip(otsu, *r["saturation"])
    pen = (hue >= r["ink_hue"][0]) & (hue <= r["ink_hue"][1]) & (saturation > r["ink_saturation"])
    black = (value < r["black_below"]) & (saturation < r["black_saturation"])
    ink = cv2.dilate((pen | black).astype(np.uint8), _disc(r["ink_margin_px"]))
    mask = (coloured & (ink == 0)).astype(np.uint8)
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, _disc(r["close_px"]))
    mask = _drop_small(mask, r["min_tissue"])
    return _drop_small(1 - mask, r["min_hole"]) == 0


def _disc(px: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (px, px))


def _drop_small(mask: np.ndarray, mm2: float) -> np.ndarray:
    """`mask` (0 or 1) without its connected parts smaller than `mm2`."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    keep = stats[:, cv2.CC_STAT_AREA] * (RECIPE["mpp"] / 1000) ** 2 >= mm2
    keep[0] = False  # label 0 is what the mask leaves out
    return keep[labels].astype(np.uint8)


def outlines(mask: np.ndarray, slide_mpp: float) -> Polygons:
    """The mask's outlines with their holes, in level-0 pixels; `rasterise` gives the mask back."""
    rings, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    polygons: dict[int, list[np.ndarray]] = {}
    for i, ring in enumerate(rings):  # a ring's parent, if it is a hole, comes before it
        level0 = np.round((ring[:, 0] + 0.5) * (RECIPE["mpp"] / slide_mpp)).astype(np.int64)
        parent = int(tree[0][i][3])
        polygons.setdefault(i if parent < 0 else parent, []).append(level0)
    # A ring of one or two pixels is no polygon to QuPath; specks that small are gone already,
    # but a hole may touch its outline.
    return [
        [outer, *(h for h in holes if len(h) > 2)]
        for outer, *holes in polygons.values()
        if len(outer) > 2
    ]


def rasterise(polygons: Polygons, size: tuple[int, int], slide_mpp: float) -> np.ndarray:
    """Polygons as a mask at RECIPE["mpp"]; pixels that an outline runs through count as tissue.

    Args:
        size: level-0 (width, height) of the slide.

    Returns:
        (h, w) bool.
    """
    scale = slide_mpp / RECIPE["mpp"]
    width, height = (max(1, round(side * scale)) for side in size)
    mask = np.zeros((height, width), np.uint8)
    for rings in polygons:
        # Filled one by one: overlapping polygons, as users draw them, would cancel out.
        pixels = [np.round(ring * scale - 0.5).astype(np.int32) for ring in rings]
        one = np.zeros_like(mask)
        cv2.fillPoly(one, pixels, (1,))
        mask |= one
    return mask > 0


def write(path: Path, polygons: Polygons, source: Any) -> None:
    """Writes GeoJSON in level-0 pixels, marked as ours.

    Args:
        source: fingerprint of the slide; outlines of another file are not reused.
    """
    features = [
        {
            "type": "Feature",
            "properties": {"objectType": "annotation", "name": "tissue", "tissue_id": i},
            "geometry": {
                "type": "Polygon",
                "coordinates": [[*ring.tolist(), ring[0].tolist()] for ring in rings],
            },
        }
        for i, rings in enumerate(polygons)
    ]
    content = {
        "type": "FeatureCollection",
        "features": features,
        "pathme_jax": {
            "recipe": digest(RECIPE),
            "source": digest(source),
            "features": digest(features),
        },
    }
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def reusable(path: Path, source: Any) -> bool:
    """Whether the file at `path` stands: the user's, or ours for this slide and recipe."""
    if not path.exists():
        return False
    content = _load(path)
    mark = content.get("pathme_jax") if isinstance(content, dict) else None
    if not isinstance(mark, dict) or mark.get("features") != digest(content.get("features")):
        return True  # changed or brought in by the user
    return mark.get("recipe") == digest(RECIPE) and mark.get("source") == digest(source)


def read(path: Path) -> Polygons:
    """Polygons of a GeoJSON file: ours, QuPath's, TRIDENT's.

    Raises:
        UserError: not GeoJSON.
    """
    content = _load(path)
    features = content.get("features", [content]) if isinstance(content, dict) else content
    polygons: Polygons = []
    try:
        for feature in features:
            geometry = feature.get("geometry") or {}
            rings = geometry.get("coordinates", [])
            if geometry.get("type") == "Polygon":
                polygons.append([np.asarray(ring, float)[:, :2] for ring in rings])
            elif geometry.get("type") == "MultiPolygon":
                polygons += [[np.asarray(ring, float)[:, :2] for ring in part] for part in rings]
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise _not_geojson(path, error) from error
    return polygons


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise _not_geojson(path, error) from error


def _not_geojson(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: not a GeoJSON outline ({error})",
        "Save it again from QuPath (objects, as FeatureCollection), or delete it to have it redone",
    )
