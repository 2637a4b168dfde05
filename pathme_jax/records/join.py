"""Joins features of several encoders and magnifications into regions, by arithmetic on grid indices."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pathme_jax.errors import UserError
from pathme_jax.files import digest, read_json
from pathme_jax.records import features as feature_files
from pathme_jax.records.fields import ViewSource
from pathme_jax.records.regions import SIDE, RegionSource, complete, region_writer

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Joined:
    """A folder of regions, how many it holds, and the slides left out: slide_id, reason, cure."""

    folder: Path
    regions: int
    errors: list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Slide:
    """Where the regions of a slide lie.

    Attributes:
        anchors: (r, 2) row, column of each region's first field.
        level0_size: width, height in px.
    """

    slide_id: str
    anchors: np.ndarray
    slide_mpp: float
    level0_size: Sequence[int]


def column_name(encoder: str, mpp: float) -> str:
    return f"{encoder}@{feature_files.magnification(mpp):g}x"


def join(
    grid_dir: str | Path, columns: Sequence[tuple[str, int]], *, progress: bool = True
) -> Joined:
    """Writes `<grid_dir>/regions-<hash8>`, unless it is there.

    Args:
        grid_dir: what `data_prep.tile` and `extract` wrote.
        columns: (encoder, multiple of the fields' mpp: 1, 4 or 16).

    A cell without a feature is marked invalid. A slide that lacks one of the columns is left out and
    listed.

    Raises:
        UserError: no slide has a region, or none has every column; widths differ.
    """
    grid_dir = Path(grid_dir)
    views = ViewSource(grid_dir)
    tiled = read_json(grid_dir / "recipe.json")
    mpp, tile_px = float(tiled["mpp"]), int(tiled["tile_px"])
    paths = {
        column_name(encoder, mpp * k): (
            grid_dir / feature_files.folder_name(mpp * k, tile_px) / f"features_{encoder}",
            SIDE[k],
        )
        for encoder, k in columns
    }
    made_of, errors = {}, []
    for slide in views.slide_ids:
        recipes = {
            n: feature_files.recipe_of(path / f"{slide}.h5") for n, (path, _) in paths.items()
        }
        missing = sorted(name for name, recipe in recipes.items() if recipe is None)
        if missing:
            errors.append(
                {
                    "slide_id": slide,
                    "reason": f"no features for {', '.join(missing)}",
                    "cure": "Run `python -m pathme_jax.extract` with these encoders and magnifications",
                }
            )
        else:
            made_of[slide] = recipes
    if not made_of:
        raise UserError(
            f"{grid_dir}: no slide has both a region and every one of {sorted(paths)}",
            errors[0]["cure"] if errors else "Slides smaller than a region give tile features only",
        )
    slides = [
        Slide(
            slide,
            np.array([views[i]["grid"] for i in views.ranges[slide]], int),
            views.sidecars[slide]["slide_mpp"],
            views.sidecars[slide]["level0_size"],
        )
        for slide in made_of
    ]

    def read(slide_id: str, name: str) -> feature_files.Bag:
        return feature_files.read_features(paths[name][0] / f"{slide_id}.h5", dtype=None)

    sides = {name: side for name, (_, side) in paths.items()}
    joined = write(grid_dir, slides, sides, read, made_of=made_of, mpp=mpp, progress=progress)
    return dataclasses.replace(joined, errors=errors + joined.errors)


def write(
    grid_dir: Path,
    slides: Sequence[Slide],
    sides: Mapping[str, int],
    read: Callable[[str, str], feature_files.Bag],
    *,
    made_of: Mapping[str, Mapping[str, str | None]],
    mpp: float,
    progress: bool = True,
) -> Joined:
    """Writes `<grid_dir>/regions-<hash8>`, unless it is there.

    Args:
        slides: in the order their regions shall have.
        sides: column name to tiles along a region's side.
        read: slide_id and column name to features with their `grid`.
        made_of: slide_id to column name to what identifies that feature file.
        mpp: of the finest tiles.

    One slide's features are in memory at a time. A slide whose features cannot be used is left out and
    listed. What the features' files tell of the encoders behind them, `made_from`, is kept in the
    recipe, but does not name the folder.

    Raises:
        UserError: no slide is left.
    """
    recipe = {"columns": sorted(sides), "slides": made_of, "version": VERSION}
    out = grid_dir / f"regions-{digest(recipe)}"
    if complete(out):
        count = len(RegionSource(out, {}))
        return Joined(out, count, read_json(out / "recipe.json").get("left_out", []))

    errors: list[dict[str, str]] = []
    made_from: dict[str, list[Any]] = {name: [] for name in sides}
    with region_writer(out, sides) as made:
        for slide in tqdm(slides, desc="regions", unit="slide", disable=not progress):
            try:  # all of a slide's columns before its first record: it is left out whole
                bags = {
                    name: _checked(read(slide.slide_id, name), made.widths.get(name))
                    for name in sides
                }
            except UserError as error:
                left_out = {"reason": error.problem, "cure": error.cure}
                errors.append({"slide_id": slide.slide_id, **left_out})
                continue
            for anchor in slide.anchors:
                made.append(
                    slide_id=slide.slide_id,
                    grid=anchor,
                    slide_mpp=slide.slide_mpp,
                    level0_size=slide.level0_size,
                    columns={n: _block(bag, anchor, sides[n]) for n, bag in bags.items()},
                )
            for name, bag in bags.items():
                told = json.loads(bag.attrs.get("made_from", "[]"))
                made_from[name] += [one for one in told if one not in made_from[name]]
        if not len(made):
            raise UserError(
                f"none of the {len(slides)} slides could be joined; {errors[0]['slide_id']}:"
                f" {errors[0]['reason']}",
                errors[0]["cure"],
            )
        about = {"mpp": mpp, "made_from": made_from}
        made.finish({**recipe, **about, **({"left_out": errors} if errors else {})})
    return Joined(out, len(made), errors)


def _checked(bag: feature_files.Bag, width: int | None) -> feature_files.Bag:
    """The same bag. width: of the slides before, or None of the first.

    Raises:
        UserError: it cannot be used.
    """
    if bag.grid is None:
        raise UserError(f"{bag.slide_id}.h5 has no `grid`", "Extract with pathme_jax.extract")
    if not len(bag.features):
        raise UserError(f"{bag.slide_id}.h5 holds no features", "Leave this slide out")
    if len(bag.grid) != len(bag.features):
        raise UserError(
            f"{bag.slide_id}.h5: {len(bag.features)} features, `grid` has {len(bag.grid)} rows",
            "Extract this slide again",
        )
    if width not in (None, bag.features.shape[-1]):
        raise UserError(
            f"{bag.slide_id}.h5 is {bag.features.shape[-1]} wide, earlier slides {width}",
            "Delete the folder and extract all slides with one encoder",
        )
    largest = float(np.finfo(np.float16).max)
    if bag.features.dtype != np.float16 and not (
        -largest <= bag.features.min() and bag.features.max() <= largest
    ):
        raise UserError(
            f"{bag.slide_id}.h5: features exceed {largest:g}, the largest float16",
            "Regions hold float16: scale this encoder's features, or leave the slide out",
        )
    return bag


def _block(bag: feature_files.Bag, anchor: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The side x side features of the region whose first field is `anchor`, and which are there."""
    assert bag.grid is not None
    # Tiles of a region lie on a grid side/4 times the fields' one; a region's view on the fields' own.
    step = max(side // 4, 1)
    at = bag.grid - anchor * step
    inside = ((at >= 0) & (at < side)).all(1)
    block = np.zeros((side, side, bag.features.shape[-1]), np.float16)
    there = np.zeros((side, side), bool)
    block[tuple(at[inside].T)] = bag.features[inside]
    there[tuple(at[inside].T)] = True
    return block, there
