"""Joins feature folders that TRIDENT made, with any encoder, into regions that PatHME trains on.

    OUT/20x-1a2b3c4d/
        recipe.json                  µm/px and tile size
        regions-<hash8>/             see `records.regions`

TRIDENT begins its grid at the slide's corner, at every magnification, so that a tile's row and column
follow from its level-0 coordinates: fine and coarse tiles cover each other where the steps are 1 : 4.
A grid that begins elsewhere (CLAM's, at each contour's bounding box) has no such parents and is refused.

TRIDENT knows magnifications, not µm/px: 20x stands for 0.5 µm/px and a 40x scan for 0.25. Our own
folders, which state the µm/px, are joined by these.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.files import listed, write_json
from pathme_jax.records import features
from pathme_jax.records.join import Joined, Slide, write
from pathme_jax.records.regions import SIDE
from pathme_jax.slides.grid import SPAN, Grid

TOLERANCE = 1.0  # level-0 px a tile may lie off its place: tools round coordinates differently
NEEDED = (
    *("patch_size", "patch_size_level0", "target_magnification"),
    *("level0_width", "level0_height"),
)
MAKE_AGAIN = (
    "Make patches and features with TRIDENT, or with data_prep.tile and pathme_jax.extract, whose grids"
    " begin at the slide's corner"
)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a feature file says of its tiles, without their features.

    Attributes:
        coords: (n, 2) level-0 x, y.
        mpp: µm/px of the tiles.
        px: side of a tile at that mpp.
        width: features a tile.
        step: side of a tile in level-0 px, perhaps not whole.
        level0_size: width, height of the slide in px.
        identity: changes when the file does.
    """

    coords: np.ndarray
    mpp: float
    px: int
    width: int
    step: float
    level0_size: tuple[int, int]
    identity: str

    @property
    def kind(self) -> tuple[float, int, int]:
        """What must be one in all files of a folder: magnification, px, width."""
        return features.magnification(self.mpp), self.px, self.width


@dataclasses.dataclass(frozen=True)
class Column:
    """A feature folder. multiple: of the finest tiles' mpp."""

    folder: Path
    multiple: int

    def path(self, slide_id: str) -> Path:
        return self.folder / f"{slide_id}.h5"

    def name(self, magnification: float) -> str:
        return f"{self.folder.name.removeprefix('features_')}@{magnification:g}x"


def join_folders(
    fine: str | Path,
    coarse: str | Path,
    experts: Sequence[str | Path],
    out: str | Path,
    *,
    progress: bool = True,
) -> Joined:
    """Writes `<out>/<grid>/regions-<hash8>` of foreign folders, unless it is there.

    Args:
        fine, coarse: folders of <slide>.h5, coarse at 4 x the µm/px of fine.
        experts: folders at the µm/px of fine.

    A slide that cannot be joined is left out and listed.

    Raises:
        UserError: folders that do not fit together, or no slide is left.
    """
    given = [Column(Path(fine), 1), Column(Path(coarse), 4)]
    given += [Column(Path(expert), 1) for expert in experts]
    found, errors = _read_all(given)
    (magnification, px, _), columns = _named(given, found)
    mpp = 10.0 / magnification

    slides, steps = [], {}
    for slide_id, tiles in found.items():
        try:
            steps[slide_id] = _step(tiles, given)
            slides.append(_slide(slide_id, tiles, given, steps[slide_id]))
        except UserError as error:
            errors.append(_listed(slide_id, error))
    if not slides:
        raise UserError(
            f"none of the {len(errors)} slides could be joined; {errors[0]['slide_id']}:"
            f" {errors[0]['reason']}",
            errors[0]["cure"],
        )

    recipe = {"source": "features", "mpp": mpp, "tile_px": px, "field_px": SPAN * px}
    grid_dir = Path(out) / features.grid_name(mpp, recipe)
    write_json(grid_dir / "recipe.json", recipe)

    def read(slide_id: str, name: str) -> features.Bag:
        bag = features.read_features(columns[name].path(slide_id), dtype=None)
        cells, _ = _cells(bag.coords, columns[name].multiple * steps[slide_id])
        return dataclasses.replace(bag, grid=cells)

    names = {column: name for name, column in columns.items()}
    made_of = {
        slide.slide_id: {
            names[column]: tiles.identity
            for column, tiles in zip(given, found[slide.slide_id], strict=True)
        }
        for slide in slides
    }
    sides = {name: SIDE[column.multiple] for name, column in columns.items()}
    joined = write(grid_dir, slides, sides, read, made_of=made_of, mpp=mpp, progress=progress)
    return dataclasses.replace(joined, errors=errors + joined.errors)


def _listed(slide_id: str, error: UserError) -> dict[str, str]:
    return {"slide_id": slide_id, "reason": error.problem, "cure": error.cure}


# --- reading


def _read_all(
    columns: Sequence[Column],
) -> tuple[dict[str, list[Tiles]], list[dict[str, str]]]:
    """The tiles of each column, by slide, and the slides of which one is missing or unlike the others."""
    for column in columns:
        if not listed(column.folder, ".h5"):
            raise UserError(
                f"{column.folder}: no feature files (*.h5)",
                "Give the folder that holds <slide>.h5, such as"
                " 20x_256px_0px_overlap/features_uni_v1",
            )
    slide_ids = sorted({path.stem for column in columns for path in listed(column.folder, ".h5")})
    found, errors = {}, []
    for slide_id in slide_ids:
        try:
            found[slide_id] = [read_tiles(column.path(slide_id)) for column in columns]
        except UserError as error:
            errors.append(_listed(slide_id, error))
    if not found:
        raise UserError(f"{errors[0]['slide_id']}: {errors[0]['reason']}", errors[0]["cure"])
    for i, column in enumerate(columns):
        kinds = collections.Counter(tiles[i].kind for tiles in found.values())
        usual = kinds.most_common(1)[0][0]
        for slide_id in [s for s, tiles in found.items() if tiles[i].kind != usual]:
            other = found.pop(slide_id)[i].kind
            unlike = UserError(
                f"{column.path(slide_id)}: {_told(other)}, most of that folder {_told(usual)}",
                "Keep one magnification, patch size and encoder in a folder",
            )
            errors.append(_listed(slide_id, unlike))
    return found, errors


def _told(kind: tuple[float, int, int]) -> str:
    magnification, px, width = kind
    return f"{px} px at {magnification:g}x, {width} wide"


def read_tiles(path: Path) -> Tiles:
    """Reads all but the features.

    Raises:
        UserError: no such file, not a feature file, an attribute missing, patches overlap, a tile twice.
    """
    if not path.exists():
        raise UserError(f"{path}: missing", "Extract this slide with that encoder, or leave it out")
    try:
        with h5py.File(path, "r") as file:
            data: Any = file["features"]
            place: Any = file["coords"]
            coords = np.asarray(place[()], np.float64).reshape(-1, 2)
            attrs = {**data.attrs, **place.attrs}
            shape = data.shape
    except (OSError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path}: not a feature file ({error})",
            "Expected HDF5 with `features` (N,D) and `coords` (N,2)",
        ) from error
    missing = [key for key in NEEDED if key not in attrs]
    if missing:
        raise UserError(
            f"{path}: `coords` lacks the attributes {', '.join(missing)} (CLAM's features have none)",
            MAKE_AGAIN,
        )
    if shape[-2:-1] != coords.shape[:1]:
        raise UserError(
            f"{path}: features of shape {shape}, {len(coords)} coordinates",
            "Give a folder of tile features; if it is one, extract this slide again",
        )
    if attrs.get("overlap", 0):
        raise UserError(
            f"{path}: patches overlap by {attrs['overlap']:g} px, expected 0",
            "Make patches again with --overlap 0",
        )
    if not len(coords):
        raise UserError(f"{path}: holds no tiles", "Leave this slide out")
    if len(np.unique(coords, axis=0)) < len(coords):
        twice = len(coords) - len(np.unique(coords, axis=0))
        raise UserError(f"{path}: {twice} tiles are there twice", "Extract this slide again")
    px, level0_px = int(attrs["patch_size"]), float(attrs["patch_size_level0"])
    mpp = float(attrs.get("mpp", 10.0 / float(attrs["target_magnification"])))
    step = px * mpp / float(attrs["level0_mpp"]) if "level0_mpp" in attrs else level0_px
    stat = path.stat()
    return Tiles(
        coords=coords,
        mpp=mpp,
        px=px,
        width=shape[-1],
        step=step,
        level0_size=(int(attrs["level0_width"]), int(attrs["level0_height"])),
        identity=str(attrs.get("recipe") or f"{stat.st_size} bytes of {stat.st_mtime_ns}"),
    )


def _named(
    columns: Sequence[Column], found: Mapping[str, list[Tiles]]
) -> tuple[tuple[float, int, int], dict[str, Column]]:
    """The finest tiles' kind, and the columns by name. Raises UserError where they do not fit together."""
    kinds = [tiles.kind for tiles in next(iter(found.values()))]
    fine, named = kinds[0], {}
    for column, kind in zip(columns, kinds, strict=True):
        expected = (fine[0] / column.multiple, fine[1])
        if not np.allclose(kind[:2], expected):
            raise UserError(
                f"{column.folder}: {kind[1]} px at {kind[0]:g}x, expected {expected[1]} px at"
                f" {expected[0]:g}x beside the {fine[1]} px at {fine[0]:g}x of {columns[0].folder}",
                "Coarse tiles must have a quarter of the magnification of fine ones, experts the same,"
                " and all one size in pixels",
            )
        name = column.name(kind[0])
        if name in named:
            raise UserError(
                f"{column.folder} and {named[name].folder} would both be column {name}",
                "Give each folder once, and rename one if they differ",
            )
        named[name] = column
    return fine, named


# --- geometry


def _cells(coords: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2) int32 row, column on the grid of `step` level-0 px, and (n, 2) x, y px off it."""
    cells = np.round(coords / step)
    return cells[:, ::-1].astype(np.int32), coords - cells * step


def _step(columns: Sequence[Tiles], about: Sequence[Column]) -> float:
    """Level-0 px between fine tiles such that all columns lie on one grid.

    Tools differ in what they do with a tile that is no whole number of pixels: some round each
    coordinate, some the step.

    Raises:
        UserError: neither fits; it names the tile furthest off.
    """
    worst = []
    for step in dict.fromkeys([columns[0].step, float(round(columns[0].step))]):
        off = []
        for tiles, column in zip(columns, about, strict=True):
            _, away = _cells(tiles.coords, step * column.multiple)
            i = np.abs(away).max(1).argmax()
            off.append((np.abs(away[i]).max(), tiles.coords[i], away[i], column))
        worst.append((max(off, key=lambda found: found[0]), step))
        if worst[-1][0][0] <= TOLERANCE:
            return step
    (_, at, away, column), step = min(worst, key=lambda found: found[0][0])
    raise UserError(
        f"{column.folder}: the tile at {at[0]:.0f}, {at[1]:.0f} lies {away[0]:+.0f}, {away[1]:+.0f} px off"
        f" the grid of {step * column.multiple:g} px from the slide's corner",
        MAKE_AGAIN,
    )


def _slide(slide_id: str, columns: Sequence[Tiles], about: Sequence[Column], step: float) -> Slide:
    """The slide's regions, on the same lattice as our own.

    Raises:
        UserError: it has none.
    """
    fine = columns[0]
    slide_mpp = fine.mpp * fine.px / step
    grid = Grid(fine.level0_size, slide_mpp, fine.mpp, SPAN * fine.px)
    stored = np.zeros(grid.shape, bool)
    for tiles, column in zip(columns, about, strict=True):
        cells, _ = _cells(tiles.coords, step * column.multiple)
        row, col = (cells * column.multiple // SPAN).T
        inside = (row < stored.shape[0]) & (col < stored.shape[1])
        stored[row[inside], col[inside]] = True
    anchors = grid.regions(stored, SPAN)
    if not anchors:
        raise UserError(
            f"no whole region of {SPAN * grid.field_um:g} µm holds a tile (the slide is"
            " {:.0f} × {:.0f} µm)".format(*(side * slide_mpp for side in grid.size)),
            "Nothing to do: tile features only",
        )
    return Slide(slide_id, np.array(anchors), slide_mpp, grid.size)
