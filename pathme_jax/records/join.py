"""Joins features of several encoders and magnifications into regions, by arithmetic on grid indices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pathme_jax.errors import UserError
from pathme_jax.files import digest, read_json
from pathme_jax.records import features as feature_files
from pathme_jax.records.fields import ViewSource
from pathme_jax.records.regions import SIDE, Index, write_regions

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Joined:
    folder: Path
    regions: int
    errors: list[dict[str, str]]


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
    mpp = float(read_json(grid_dir / "recipe.json")["mpp"])
    paths = {
        column_name(encoder, mpp * k): (
            grid_dir / feature_files.folder_name(mpp * k) / f"features_{encoder}",
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
    recipe = {"columns": sorted(paths), "slides": made_of, "version": VERSION}
    out = grid_dir / f"regions-{digest(recipe)}"
    count = sum(len(views.ranges[s]) for s in made_of)
    if (out / "recipe.json").exists():
        return Joined(out, count, errors)

    slide_id, grid, slide_mpp, level0_size = [], [], [], []
    values: dict[str, list[np.ndarray]] = {name: [] for name in paths}
    valid: dict[str, list[np.ndarray]] = {name: [] for name in paths}
    for slide in tqdm(made_of, desc="regions", unit="slide", disable=not progress):
        about = views.sidecars[slide]
        anchors = [np.asarray(views[i]["grid"], int) for i in views.ranges[slide]]
        slide_id += [slide] * len(anchors)
        grid += anchors
        slide_mpp += [about["slide_mpp"]] * len(anchors)
        level0_size += [about["level0_size"]] * len(anchors)
        for name, (path, side) in paths.items():
            bag = feature_files.read_features(path / f"{slide}.h5")
            if bag.grid is None:
                raise UserError(
                    f"{path / slide}.h5 has no `grid`", "Extract with pathme_jax.extract"
                )
            known = values[name][0].shape[-1] if values[name] else bag.features.shape[-1]
            if len(bag.features) and bag.features.shape[-1] != known:
                raise UserError(
                    f"{path / slide}.h5 is {bag.features.shape[-1]} wide, earlier slides {known}",
                    "Delete the folder and extract all slides with one encoder",
                )
            for anchor in anchors:
                block, there = _block(bag, anchor, side, known)
                values[name].append(block)
                valid[name].append(there)
    index = Index(
        np.array(slide_id),
        np.array(grid, np.int32),
        np.array(slide_mpp),
        np.array(level0_size),
        {name: np.array(masks) for name, masks in valid.items()},
    )
    write_regions(
        out,
        index=index,
        columns={name: np.array(blocks) for name, blocks in values.items()},
        recipe={**recipe, "mpp": mpp},
    )
    return Joined(out, count, errors)


def _block(
    bag: feature_files.Bag, anchor: np.ndarray, side: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The side x side features of the region whose first field is `anchor`, and which are there."""
    assert bag.grid is not None
    # Tiles of a region lie on a grid side/4 times the fields' one; a region's view on the fields' own.
    step = max(side // 4, 1)
    at = bag.grid - anchor * step
    inside = ((at >= 0) & (at < side)).all(1)
    block = np.zeros((side, side, width), np.float32)
    there = np.zeros((side, side), bool)
    block[tuple(at[inside].T)] = bag.features[inside]
    there[tuple(at[inside].T)] = True
    return block, there
