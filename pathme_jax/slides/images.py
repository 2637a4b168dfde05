"""From folders of patches (PNG, JPEG, TIFF) to fields, for who has no slides but NCT-CRC, PCam or BACH.

    OUT/20x-1a2b3c4d/            one folder per recipe; see `records.fields`
        recipe.json  slides.csv  errors.csv  labels.csv  fields/  tfds/

A sub-folder of images stands for a slide; its images, cut into square tiles, lie one below the other as if
they were one slide, and every tile is a field of one cell. The sidecar's `names` says which image
each record is from. There are no views and no coarser tiles: what lay around a patch is not known.

A JPEG of a tile's size is stored byte for byte, so that it is not compressed twice. All else is
stored as fields of slides are (`fields.encode`). An image's margin that fills no tile is left out, the
same on opposite sides.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pathme_jax.errors import UserError
from pathme_jax.files import digest, read_json, write_csv, write_json
from pathme_jax.records import features, fields

EXTENSIONS = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
LARGEST = 1024  # px: a larger image is cut
TILE_PX = 256  # of images without a common size
SAMPLE = 100  # images of a sub-folder whose size is looked at
EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}  # Pillow's modes
SLIDE_COLUMNS = [
    *("slide_id", "path", "state", "mpp", "level0_width", "level0_height"),
    *("fields", "tiles", "regions"),
]
ERROR_COLUMNS = ["slide_id", "image", "reason", "cure"]
LABEL_COLUMNS = ["image", "slide_id", "label"]
NO_VIEWS = {"records": 0, "bytes": 0, "sha256": ""}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the fields; its digest names their folder.

    Attributes:
        mpp: µm per pixel of the images.
        tile_px: side of the tiles they are cut into.
    """

    mpp: float
    tile_px: int

    def check(self) -> None:
        """Raises UserError on a value that cannot be served."""
        if not 0.05 <= self.mpp <= 20:
            raise UserError(f"--mpp {self.mpp:g}: expected 0.05 to 20 µm per pixel", "Correct it")
        if not 1 <= self.tile_px <= LARGEST:
            raise UserError(f"--tile-px {self.tile_px}: expected 1 to {LARGEST}", "Correct it")

    def content(self) -> dict[str, Any]:
        return {
            "source": "images",
            "mpp": self.mpp,
            "tile_px": self.tile_px,
            "field_px": self.tile_px,
            "jpeg": {"quality": fields.QUALITY, "subsampling": fields.SUBSAMPLING},
            "schema": fields.SCHEMA,
        }

    @property
    def hash8(self) -> str:
        return digest(self.content())

    @property
    def folder(self) -> str:
        return features.grid_name(self.mpp, self.content())


@dataclasses.dataclass(frozen=True)
class Folder:
    """The images directly in one folder.

    Attributes:
        slide_id: its path below the folder that was given, parts joined by "__".
        label: its name, or "" for the folder that was given.
        names: of the images, as paths from the folder that was given.
    """

    root: Path
    slide_id: str
    label: str
    names: tuple[str, ...]

    def inputs(self, recipe: Recipe) -> dict[str, Any]:
        """All that the output depends on."""
        return {"recipe": recipe.hash8, "files": digest([self._identity(n) for n in self.names])}

    def _identity(self, name: str) -> tuple[str, int, int] | tuple[str, None]:
        try:
            stat = (self.root / name).stat()
        except OSError:  # gone, or a link that leads nowhere: told of when it is read
            return name, None
        return name, stat.st_size, stat.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class Stored:
    """What came of a run: rows of slides.csv (a sub-folder each) and of errors.csv."""

    grid_dir: Path
    folders: list[dict[str, Any]]
    errors: list[dict[str, str]]

    def __str__(self) -> str:
        tiles = sum(row["fields"] or 0 for row in self.folders)
        lines = [
            f"{tiles} tiles of images in {len(self.folders)} folders, {len(self.errors)} images left"
            f" out: {self.grid_dir}"
        ]
        lines += [f"  {e['image']}: {e['reason']}. {e['cure']}" for e in self.errors[:10]]
        if len(self.errors) > 10:
            lines.append(f"  … all in {self.grid_dir / 'errors.csv'}")
        return "\n".join(lines)


def run(
    images: str | Path,
    out: str | Path,
    *,
    mpp: float,
    tile_px: int | None = None,
    workers: int = 2,
    progress: bool = True,
) -> Stored:
    """Stores every sub-folder that is not done; bad images are listed and do not stop the others.

    Args:
        images: folder of images, also in sub-folders, whose names are taken for labels.
        out: where everything goes.
        mpp: µm per pixel of the images.
        tile_px: side of the tiles; default: the images' own where most have one square size of at most
            1024 px, else 256.
        workers: threads that decode.

    Raises:
        UserError: wrong arguments, or no image at all could be stored.
        OSError: the disk is full.
    """
    folders = find_images(images)
    recipe = _recipe(folders, mpp, tile_px)
    grid_dir = Path(out) / recipe.folder
    if not (grid_dir / "recipe.json").exists():
        write_json(grid_dir / "recipe.json", recipe.content())
    sidecars = {folder.slide_id: finished(grid_dir, folder, recipe) for folder in folders}
    pending = [folder for folder in folders if sidecars[folder.slide_id] is None]
    count = sum(len(folder.names) for folder in pending)
    with (
        concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(total=count, desc="tile", unit="image", disable=not progress) as bar,
    ):
        for folder in pending:
            cut = _cut_ahead(pool, folder, recipe.tile_px, 4 * workers)
            sidecars[folder.slide_id] = _store(grid_dir, folder, recipe, _counted(cut, bar))
    return _finish(grid_dir, folders, sidecars)


def preview(
    images: str | Path,
    out: str | Path,
    *,
    mpp: float,
    tile_px: int | None = None,
    workers: int = 2,
) -> str:
    """What `run` would do with the same arguments, a line per sub-folder; writes nothing."""
    del workers
    folders = find_images(images)
    recipe = _recipe(folders, mpp, tile_px)
    grid_dir = Path(out) / recipe.folder
    lines = [f"tiles of {recipe.tile_px} px at {mpp:g} µm/px: {grid_dir}"]
    for folder in folders:
        state = "done" if finished(grid_dir, folder, recipe) else "to do"
        lines.append(f"{folder.slide_id}  {state}  {len(folder.names)} images")
    return "\n".join(lines)


def find_images(root: str | Path) -> list[Folder]:
    """The folders below `root`, itself included, that hold images; by slide_id, images by name.

    Links are followed, but for those that lead back to a folder they are in.

    Raises:
        UserError: none there, or two folders with one slide_id.
    """
    root = Path(root)
    found: dict[str, Folder] = {}
    for where, below, files in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not _leads_back(Path(where, name))]
        inside = Path(where).relative_to(root)
        chosen = (f for f in files if Path(f).suffix.lower() in EXTENSIONS and f[0] != ".")
        names = tuple(sorted((inside / f).as_posix() for f in chosen))
        if not names:
            continue
        slide_id = "__".join(inside.parts) or root.resolve().name
        if slide_id in found:
            raise UserError(
                f"{root}: two folders would both be {slide_id!r}, one of them {inside}",
                "Rename one",
            )
        found[slide_id] = Folder(root, slide_id, inside.name, names)
    if not found:
        raise UserError(
            f"{root}: no image in it or in its sub-folders",
            f"Give --images a folder of {' '.join(sorted(EXTENSIONS))} files",
        )
    return [found[slide_id] for slide_id in sorted(found)]


def _leads_back(folder: Path) -> bool:
    try:
        return any(folder.samefile(parent) for parent in folder.parents)
    except OSError:  # gone, or not to be entered: nothing will be found in it
        return False


def _recipe(folders: list[Folder], mpp: float, tile_px: int | None) -> Recipe:
    recipe = Recipe(mpp, _usual_side(folders) if tile_px is None else tile_px)
    recipe.check()
    return recipe


def _usual_side(folders: list[Folder]) -> int:
    """The side of most images, where they are square and small enough to stay whole."""
    sizes = collections.Counter()
    for folder in folders:
        for name in folder.names[:: -(-len(folder.names) // SAMPLE)]:
            try:
                with Image.open(folder.root / name) as image:
                    sizes[image.size] += 1
            except Exception:  # told of when it is stored
                continue
    (width, height), _ = sizes.most_common(1)[0] if sizes else ((0, 0), 0)
    return width if width == height and 0 < width <= LARGEST else TILE_PX


def finished(grid_dir: Path, folder: Folder, recipe: Recipe) -> dict[str, Any] | None:
    """The sidecar of a folder that needs no more work, else None."""
    try:
        sidecar = read_json(fields.sidecar_path(grid_dir, folder.slide_id))
        size = _shard(grid_dir, folder).stat().st_size
        same = (
            sidecar["inputs"] == folder.inputs(recipe) and sidecar[fields.FIELDS]["bytes"] == size
        )
    except (OSError, ValueError, KeyError):
        return None
    return sidecar if same else None


def _shard(grid_dir: Path, folder: Folder) -> Path:
    return grid_dir / fields.FIELDS / f"{folder.slide_id}.array_record"


# --- one image

Tiles = list[list[bytes]]  # JPEGs by row, then column


def cut(path: Path, px: int) -> Tiles:
    """The whole tiles of `px` pixels that an image holds, around its centre.

    Raises:
        UserError: unreadable, of more than 8 bits a channel, or smaller than a tile.
    """
    try:
        return _cut(path.read_bytes(), px)
    except UserError:
        raise
    except Exception as error:  # decoders fail with anything
        raise UserError(
            f"cannot be read ({type(error).__name__}: {error})", "Copy it again from its source"
        ) from error


def _cut(data: bytes, px: int) -> Tiles:
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        rows, columns = height // px, width // px
        if image.mode not in EIGHT_BITS:
            raise UserError(f"its pixels are {image.mode}", "Save it as RGB with 8 bits a channel")
        if not rows or not columns:
            raise UserError(
                f"{width} × {height} px, smaller than a tile of {px} px",
                "Leave it out, or give a smaller --tile-px",
            )
        if image.format == "JPEG" and image.size == (px, px) and image.mode in ("RGB", "L"):
            fields.decode(data)  # damage is found now, not in training
            return [[data]]
        pixels = _rgb(image)
    top, left = (height - rows * px) // 2, (width - columns * px) // 2
    return [
        [fields.encode(pixels[y : y + px, x : x + px]) for x in range(left, left + columns * px, px)]
        for y in range(top, top + rows * px, px)
    ]  # fmt: skip


def _rgb(image: Image.Image) -> np.ndarray:
    """(h, w, 3) uint8, white where transparent, as slides are where nothing was scanned."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _cut_ahead(
    pool: concurrent.futures.Executor, folder: Folder, px: int, depth: int
) -> Iterator[tuple[str, Tiles | UserError]]:
    """Each image's name and tiles, or what is wrong with it; at most `depth` are held."""
    waiting: collections.deque = collections.deque()

    def first() -> tuple[str, Tiles | UserError]:
        name, future = waiting.popleft()
        try:
            return name, future.result()
        except UserError as error:
            return name, error

    for name in folder.names:
        waiting.append((name, pool.submit(cut, folder.root / name, px)))
        if len(waiting) > depth:
            yield first()
    while waiting:
        yield first()


def _counted(items: Iterable[Any], bar: tqdm) -> Iterator[Any]:
    for item in items:
        yield item
        bar.update()


# --- one folder


def _store(
    grid_dir: Path,
    folder: Folder,
    recipe: Recipe,
    images: Iterable[tuple[str, Tiles | UserError]],
) -> dict[str, Any]:
    """Writes a folder's shard and sidecar, and returns the sidecar; of no good image, nothing is left."""
    names: list[str] = []
    errors: list[dict[str, str]] = []
    extent = [0, 0]  # rows, columns of tiles so far

    def records() -> Iterator[bytes]:
        for name, tiles in images:
            if isinstance(tiles, UserError):
                about = {"slide_id": folder.slide_id, "image": name}
                errors.append({**about, "reason": tiles.problem, "cure": tiles.cure})
                continue
            for row in tiles:
                for column, jpeg in enumerate(row):
                    names.append(name)
                    yield _record(jpeg, folder, recipe, (extent[0], column))
                extent[:] = extent[0] + 1, max(extent[1], len(row))

    sidecar_path, inputs = fields.sidecar_path(grid_dir, folder.slide_id), folder.inputs(recipe)
    sidecar_path.unlink(missing_ok=True)
    stored = fields.write_shard(_shard(grid_dir, folder), records())
    rows, columns = extent
    sidecar = {
        "slide_id": folder.slide_id,
        "path": str(folder.root / Path(folder.names[0]).parent),
        "state": "done" if names else "failed",
        "slide_mpp": recipe.mpp,
        "level0_size": [columns * recipe.tile_px, rows * recipe.tile_px],
        "grid": extent,
        "cells": 1,
        "names": names,
        "errors": errors,
        fields.FIELDS: stored,
        fields.VIEWS: NO_VIEWS,
        "tiles": len(names),
        "inputs": inputs,
    }
    if names:
        write_json(sidecar_path, sidecar)
    else:
        _shard(grid_dir, folder).unlink()
    return sidecar


def _record(jpeg: bytes, folder: Folder, recipe: Recipe, at: tuple[int, int]) -> bytes:
    px = recipe.tile_px
    return fields.serialise(
        fields.FIELDS,
        {
            "image": jpeg,
            "slide_id": folder.slide_id,
            "grid": np.array(at, np.int32),
            "level0_xy": np.array(at[::-1], np.int64) * px,
            "level0_size": np.array([px, px], np.int64),
            "mpp": np.float32(recipe.mpp),
            "slide_mpp": np.float32(recipe.mpp),
            "tissue": np.ones((1, 1), bool),
            "recipe": recipe.hash8,
        },
    )


# --- all of them


def _finish(grid_dir: Path, folders: list[Folder], sidecars: dict[str, Any]) -> Stored:
    errors = [error for sidecar in sidecars.values() for error in sidecar["errors"]]
    rows = [_row(sidecars[folder.slide_id]) for folder in folders]
    done = {s: sidecar for s, sidecar in sidecars.items() if sidecar["state"] == "done"}
    if done:
        fields.write_tfds(grid_dir, done)
    labels = [
        {"image": name, "slide_id": folder.slide_id, "label": folder.label}
        for folder in folders
        for name in dict.fromkeys(sidecars[folder.slide_id]["names"])
        if folder.label
    ]
    if labels:
        write_csv(grid_dir / "labels.csv", labels, LABEL_COLUMNS)
    write_csv(grid_dir / "errors.csv", errors, ERROR_COLUMNS)
    write_csv(grid_dir / "slides.csv", rows, SLIDE_COLUMNS)
    if not done:
        first = errors[0]
        raise UserError(
            f"none of the {len(errors)} images could be stored; {first['image']}: {first['reason']}",
            f"{first['cure']}. All reasons and cures: {grid_dir / 'errors.csv'}",
        )
    return Stored(grid_dir, rows, errors)


def _row(sidecar: dict[str, Any]) -> dict[str, Any]:
    width, height = sidecar["level0_size"]
    return {
        **{key: sidecar[key] for key in ("slide_id", "path", "state", "tiles")},
        "mpp": sidecar["slide_mpp"],
        "level0_width": width,
        "level0_height": height,
        "fields": sidecar[fields.FIELDS]["records"],
        "regions": 0,
    }
