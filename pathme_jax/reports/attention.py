"""Where a head looked on the slides shown: heatmaps over pictures, and the tiles it looked at most."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.records.features import SPATIAL
from pathme_jax.reports import evidence, figures
from pathme_jax.slides.listing import SlideFile
from pathme_jax.slides.reader import Reader, open_slide, read_scaled, resize

SHOWN = 2  # slides of each end of the table
SIDE = 560  # px of the pictures
TILES = 8
TILE_PX = 224


@dataclasses.dataclass(frozen=True)
class Attention:
    """What a head looked at on a slide.

    Attributes:
        coords: (m, 2) level-0 x, y of the tiles' upper left corners; attention: (m,).
        side: of a tile in level-0 px, None in foreign files that do not say.
        size: (width, height) of the slide in level-0 px, None likewise.
    """

    coords: np.ndarray
    attention: np.ndarray
    side: float | None
    size: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Where pictures of slides come from.

    Attributes:
        thumbnails: folder of <slide_id>.jpg or .png, or None.
        slides: the whole slides by their id.
    """

    thumbnails: Path | None = None
    slides: Mapping[str, SlideFile] = dataclasses.field(default_factory=dict)

    def has(self, slide_id: str) -> bool:
        return slide_id in self.slides or self._file(slide_id) is not None

    def _file(self, slide_id: str) -> Path | None:
        if self.thumbnails is None:
            return None
        files = (Path(self.thumbnails) / f"{slide_id}{end}" for end in (".jpg", ".jpeg", ".png"))
        return next((file for file in files if file.is_file()), None)

    def thumbnail(self, slide_id: str) -> np.ndarray | None:
        """(h, w, 3) RGB, or None where there is no file or it cannot be read."""
        file = self._file(slide_id)
        return None if file is None else figures.read_picture(file, SIDE)


@dataclasses.dataclass
class Shown:
    """A slide that is looked at more closely.

    Attributes:
        slide_id: which. told: how it was judged.
        seen: its attention.
        picture, heatmap: JPEG, or None.
        tiles: JPEG and x, y of the most attended tiles, the most first.
        missing: why a picture or the tiles are not there, in sentences.
    """

    slide_id: str
    told: str
    seen: Attention
    picture: bytes | None = None
    heatmap: bytes | None = None
    tiles: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)


def shown(folder: Path, rows: list[evidence.Slide], pictures: Pictures) -> list[Shown]:
    """Slides of both ends of the table with attention saved, those with a picture before those without.

    Args:
        folder: of the attention files.
        rows: of the slide table, see `evidence.slides`. Of a bag of several slides the first is shown.
    """
    found: dict[str, Shown] = {}
    for end in evidence.chosen(rows):
        first: dict[str, evidence.Slide] = {}
        for row in end:
            first.setdefault(row.slide_id.split(";")[0], row)
        order = [s for s in first if s not in found and (folder / f"{s}.h5").is_file()]
        taken = 0
        for slide_id in sorted(order, key=lambda s: not pictures.has(s)):
            seen = read(folder / f"{slide_id}.h5") if taken < SHOWN else None
            if seen is not None:
                taken += 1
                found[slide_id] = _look(slide_id, first[slide_id].told, seen, pictures)
    return list(found.values())


def read(file_name: Path) -> Attention | None:
    """Attention of the tiles of one slide; None if it has none, such as prompt tokens only, or cannot be read."""
    try:
        with h5py.File(file_name, "r") as file:
            attention = np.asarray(file["attention"])
            spatial = np.ones(len(attention), bool)  # prompt tokens have no place of their own
            if "kind" in file:
                spatial = np.asarray(file["kind"]) == SPATIAL
            coords = np.asarray(file["coords"])
            attrs: dict[str, Any] = dict(file["coords"].attrs)
    except (OSError, KeyError):
        return None
    if not spatial.any():
        return None
    side = attrs.get("patch_size_level0")
    size = [attrs.get(key) for key in ("level0_width", "level0_height")]
    return Attention(
        coords[spatial],
        attention[spatial],
        None if side is None else float(side),
        None if None in size else (int(size[0]), int(size[1])),  # pyright: ignore[reportArgumentType]
    )


def _look(slide_id: str, told: str, seen: Attention, pictures: Pictures) -> Shown:
    one = Shown(slide_id, told, seen)
    thumbnail, size = pictures.thumbnail(slide_id), seen.size
    if seen.side is None:
        one.missing.append("its feature file does not say how large a tile is.")
    elif slide_id in pictures.slides:
        try:
            # The µm/px is not asked for: with 1 per level-0 px, a level's is its downsample.
            with open_slide(pictures.slides[slide_id].path, mpp=1.0) as slide:
                one.tiles = _top_tiles(slide, seen.coords, seen.attention, seen.side)
                size = size or slide.level_sizes[0]
                if thumbnail is None:
                    thumbnail = read_scaled(slide, max(slide.level_sizes[0]) / SIDE)
        except UserError as error:
            one.missing.append(f"the slide {error}")
    elif pictures.slides:
        one.missing.append("it is not in the folder of slides: its tiles cannot be cut out.")
    if thumbnail is not None:
        one.picture = figures.encode_jpeg(thumbnail)
        if seen.side is not None and size is not None:
            one.heatmap = figures.attention_overlay(
                thumbnail, seen.coords, seen.attention, seen.side, size
            )
        else:
            one.missing.append("its feature file does not say where on the slide its tiles lie.")
    elif pictures.thumbnails is not None:
        one.missing.append("there is no thumbnail of it.")
    return one


def _top_tiles(
    slide: Reader, coords: np.ndarray, attention: np.ndarray, side: float
) -> list[dict[str, Any]]:
    """The most attended tiles, from the coarsest level that has their pixels."""
    fit = [i for i, ratio in enumerate(slide.level_mpps) if ratio <= max(1.0, side / TILE_PX)]
    level = max(fit, key=lambda i: slide.level_mpps[i])
    ratio = slide.level_mpps[level]
    px = max(1, round(side / ratio))
    tiles = []
    for i in np.argsort(-attention, kind="stable")[:TILES].tolist():
        x, y = coords[i].tolist()
        pixels = slide.read(level, round(x / ratio), round(y / ratio), px, px)
        image = figures.encode_jpeg(resize(pixels, TILE_PX, TILE_PX))
        tiles.append({"image": image, "x": x, "y": y})
    return tiles
