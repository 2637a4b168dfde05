"""Multi-scale tokens of every region with a region encoder, one bag a slide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pathme_jax.encoders.encoder import Encoder, load
from pathme_jax.encoders.extraction import VERSION, Extracted, precision_here
from pathme_jax.errors import UserError
from pathme_jax.files import digest, read_json
from pathme_jax.records import features as feature_files
from pathme_jax.records.regions import RegionSource


def extract_regions(
    regions_dir: str | Path,
    encoder: str | Path,
    *,
    out: str | Path | None = None,
    dtype: str = "float16",
    precision: str | None = None,
    batch: int = 8,
    progress: bool = True,
) -> Extracted:
    """Multi-scale tokens of every region, one bag a slide, beside the grid the regions came from.

    Tokens whose `valid` is false leave the bag. Prompt tokens take their region's coordinates. Several
    processes on one folder are safe, but do the same slides.

    Args:
        regions_dir: what `data_prep.regions` wrote.
        encoder: the --workdir of a region encoder's training.
        out, dtype, precision: see `extraction.extract`.
        batch: regions.

    Raises:
        UserError: no regions there, or not the encoder's columns; an encoder of images.
    """
    regions_dir = Path(regions_dir)
    grid_dir = regions_dir.parent
    precision = precision or precision_here()
    model = load(encoder, precision)
    if model.record != "regions":
        raise UserError(f"{model.name} encodes images, not regions", "Extract with --fields")
    source = RegionSource(regions_dir, model.columns)
    recipe = _grid_recipe(grid_dir)
    mpp, tile_px = 4 * float(recipe["mpp"]), int(recipe["tile_px"])
    root = Path(out) / grid_dir.name if out else grid_dir
    folder = root / feature_files.folder_name(mpp, tile_px) / f"features_{model.name}"
    slides = sorted(set(source.index.slide_id.tolist()))
    # The regions' name holds the digest of the features they were joined from.
    made_by = digest([model.name, regions_dir.name, dtype, precision, VERSION])
    done, errors = 0, []
    for slide_id in tqdm(slides, desc="extract regions", disable=not progress, unit="slide"):
        if feature_files.recipe_of(folder / f"{slide_id}.h5") == made_by:
            continue
        mine = np.flatnonzero(source.index.slide_id == slide_id)
        # Of the regions, not of the grid's slides: other cohorts may share the grid and have such a slide.
        slide_mpp = float(source.index.slide_mpp[mine[0]])
        about = feature_files.coordinate_attrs(
            slide_id=slide_id,
            mpp=mpp,
            slide_mpp=slide_mpp,
            level0_size=source.index.level0_size[mine[0]].tolist(),
            px=tile_px,
        )
        try:
            tokens, cells, kind = _encode(model, source, mine, batch)
            feature_files.write_features(
                folder / f"{slide_id}.h5",
                features=tokens,
                coords=feature_files.level0(cells, tile_px * mpp, slide_mpp),
                grid=cells,
                kind=kind,
                attrs={
                    **about,
                    "encoder": model.name,
                    "recipe": made_by,
                    "made_from": json.dumps(model.lineage),
                },
                dtype=dtype,
            )
            done += 1
        except UserError as error:
            errors.append({"slide_id": slide_id, "reason": error.problem, "cure": error.cure})
    skipped = len(slides) - done - len(errors)
    return Extracted({(model.name, mpp): folder}, errors, done, skipped)


def describe(regions_dir: str | Path, encoder: str | Path) -> str:
    """What `extract_regions` would do."""
    source = RegionSource(regions_dir, {})
    slides = len(set(source.index.slide_id.tolist()))
    return f"{load(encoder).name}: {len(source)} regions of {slides} slides"


def _grid_recipe(grid_dir: Path) -> Any:
    path = grid_dir / "recipe.json"
    if not path.exists():
        raise UserError(
            f"{path}: missing, so the size of these regions' tiles is unknown",
            "Keep regions in the grid's folder that data_prep.regions wrote them to",
        )
    return read_json(path)


def _encode(
    model: Encoder, source: RegionSource, mine: np.ndarray, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (m, d), cells (m, 2) and kinds (m,) of the valid tokens of the regions `mine`."""
    tokens, cells, kind = [], [], []
    for start in range(0, len(mine), batch):
        at = mine[start : start + batch]
        items = [source[i] for i in at]
        items += [items[0]] * (batch - len(items))
        got = model.encode({k: np.stack([item[k] for item in items]) for k in items[0]})
        got = {k: np.asarray(v) for k, v in got.items()}
        for n, i in enumerate(at):
            keep = got["valid"][n]
            tokens.append(got["features"][n][keep].astype(np.float32))
            cells.append(source.index.grid[i] + got["cell"][keep])
            kind.append(got["kind"][keep])
    return np.concatenate(tokens), np.concatenate(cells), np.concatenate(kind)
