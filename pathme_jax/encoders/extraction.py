"""Features of every slide, in TRIDENT's layout.

Each slide is encoded by itself in batches of one static shape, so a slide's features do not depend on
which slides were done before: a run that was killed ends with the same bytes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pathme_jax.encoders.encoder import Encoder, load
from pathme_jax.errors import UserError
from pathme_jax.files import digest, read_json
from pathme_jax.records import features as feature_files
from pathme_jax.records import fields
from pathme_jax.records.features import write_features
from pathme_jax.records.regions import RegionSource

VERSION = 1  # of what is computed here; part of every recipe
LADDER = (1, 4, 16)  # magnifications, as multiples of the fields' mpp


@dataclasses.dataclass(frozen=True)
class Extracted:
    """What an extraction left.

    Attributes:
        folders: (encoder name, mpp) to the folder of that encoder's HDF5 files.
        errors: {"slide_id", "reason", "cure"} of slides that failed.
        done, skipped: slides encoded now, and found done.
    """

    folders: dict[tuple[str, float], Path]
    errors: list[dict[str, str]]
    done: int
    skipped: int


def parse_multiples(text: str) -> list[int]:
    try:
        multiples = [int(part) for part in text.split(",")]
    except ValueError:
        multiples = []
    if not multiples or not set(multiples) <= set(LADDER):
        raise UserError(f"--multiples {text!r}", f"Give some of {', '.join(map(str, LADDER))}")
    return multiples


def describe(where: str | Path, encoders: Sequence[str | Path]) -> str:
    """What an extraction would do: the encoders, slides and tiles. Encodes nothing."""
    names = [load(name).name for name in encoders]
    if (Path(where) / "index.npz").exists():
        source = RegionSource(where, {})
        return f"{names[0]}: {len(source)} regions of {len(set(source.index.slide_id))} slides"
    source = fields.FieldSource(where)
    tiles = sum(int(np.asarray(source[i]["tissue"]).sum()) for i in range(len(source)))
    return (
        f"{', '.join(names)}: {len(source.slide_ids)} slides, {len(source)} fields, {tiles} tissue"
        " tiles at the finest magnification"
    )


def folder(grid_dir: Path, encoder: str, mpp: float) -> Path:
    return Path(grid_dir) / feature_files.folder_name(mpp) / f"features_{encoder}"


# ---- patch encoders --------------------------------------------------------------------------------


def extract_fields(
    grid_dir: str | Path,
    encoders: Sequence[str | Path],
    *,
    multiples: Iterable[int] = LADDER,
    batch: int = 64,
    progress: bool = True,
) -> Extracted:
    """Encodes every tissue tile at the chosen magnifications, each tile with every encoder.

    At the fields' own mpp the tiles are the tissue children of each field; at 4 x, the whole field,
    area-averaged; at 16 x, the stored region views.

    Args:
        grid_dir: what `data_prep.tile` wrote.
        encoders: names or work folders, all reading images.
        multiples: of the fields' mpp, among 1, 4, 16.
    """
    grid_dir, multiples = Path(grid_dir), sorted(set(multiples))
    models = [load(name) for name in encoders]
    for model in models:
        if model.record != "fields":
            raise UserError(f"{model.name} encodes regions, not images", "Extract with --regions")
    source = fields.FieldSource(grid_dir)
    views = fields.ViewSource(grid_dir) if 16 in multiples else None
    mpp = float(read_json(grid_dir / "recipe.json")["mpp"])
    folders = {
        (m.name, mpp * k): folder(grid_dir, m.name, mpp * k) for m in models for k in multiples
    }

    sidecars = source.sidecars
    recipe = {(s, key): _recipe(sidecars[s], key) for s in source.slide_ids for key in folders}
    todo = [
        s
        for s in source.slide_ids
        if any(
            feature_files.recipe_of(path / f"{s}.h5") != recipe[s, key]
            for key, path in folders.items()
        )
    ]
    errors = []
    bar = tqdm(total=len(todo), desc="extract", disable=not progress or not todo, unit="slide")
    for slide in todo:
        try:
            rows = _encode(models, _tiles(source, views, slide, multiples), batch)
            # A slide smaller than a region has no view: its width is that of another magnification.
            some = next((tiles[0].features for tiles in rows.values() if tiles), {})
            for (name, at), path in folders.items():
                multiple = round(at / mpp)
                _write(
                    path / f"{slide}.h5",
                    rows[multiple],
                    width=len(some.get(name, ())),
                    # a region view's cell is that of its first field
                    cell_um=256 * mpp * min(multiple, 4),
                    attrs=_attrs(sidecars[slide], name, at, recipe[slide, (name, at)]),
                )
        except UserError as error:
            errors.append({"slide_id": slide, "reason": error.problem, "cure": error.cure})
        bar.update()
    bar.close()
    return Extracted(folders, errors, len(todo) - len(errors), len(source.slide_ids) - len(todo))


@dataclasses.dataclass
class _Tile:
    multiple: int
    image: np.ndarray  # (256, 256, 3) uint8
    grid: tuple[int, int]
    features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def _tiles(source: Any, views: Any, slide: str, multiples: Sequence[int]) -> Iterator[_Tile]:
    """A slide's tiles in a fixed order, decoded a few fields ahead on other threads."""

    def of_field(i: int) -> list[_Tile]:
        record = source[i]
        image = fields.decode(record["image"])
        tissue = np.asarray(record["tissue"], bool)
        row, column = (int(x) for x in record["grid"])
        side = tissue.shape[0]
        px = image.shape[0] // side
        found = []
        if 1 in multiples:
            found += [
                _Tile(
                    1,
                    image[r * px : (r + 1) * px, c * px : (c + 1) * px],
                    (row * side + int(r), column * side + int(c)),
                )
                for r, c in np.argwhere(tissue)
            ]
        if 4 in multiples:
            found.append(_Tile(4, fields.area_average(image, side), (row, column)))
        return found

    def of_view(i: int) -> list[_Tile]:
        record = views[i]
        row, column = (int(x) for x in record["grid"])
        return [_Tile(16, fields.decode(record["image"]), (row, column))]

    jobs = [(of_field, i) for i in source.ranges[slide]]
    if 16 in multiples:
        jobs += [(of_view, i) for i in views.ranges.get(slide, ())]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ahead: collections.deque = collections.deque()
        for function, i in jobs:
            ahead.append(pool.submit(function, i))
            if len(ahead) > 8:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _encode(
    models: Sequence[Encoder], tiles: Iterator[_Tile], batch: int
) -> dict[int, list[_Tile]]:
    rows: dict[int, list[_Tile]] = collections.defaultdict(list)
    waiting: list[_Tile] = []

    def flush() -> None:
        images = np.zeros((batch, *waiting[0].image.shape), np.uint8)
        for i, tile in enumerate(waiting):
            images[i] = tile.image
        for model in models:
            out = np.asarray(model.encode({"image": images}), np.float32)
            for tile, row in zip(waiting, out, strict=False):
                tile.features[model.name] = row
        for tile in waiting:
            tile.image = images[:0]  # pixels are done with
            rows[tile.multiple].append(tile)
        waiting.clear()

    for tile in tiles:
        waiting.append(tile)
        if len(waiting) == batch:
            flush()
    if waiting:
        flush()
    return rows


def _write(
    path: Path, tiles: list[_Tile], *, width: int, cell_um: float, attrs: dict[str, Any]
) -> None:
    tiles = sorted(tiles, key=lambda tile: tile.grid)
    grid = np.array([t.grid for t in tiles], np.int32).reshape(-1, 2)
    rows = [t.features[attrs["encoder"]] for t in tiles]
    write_features(
        path,
        features=np.array(rows, np.float32).reshape(-1, width),
        coords=level0(grid, cell_um, attrs["level0_mpp"]),
        grid=grid,
        attrs=attrs,
    )


def level0(grid: np.ndarray, cell_um: float, slide_mpp: float) -> np.ndarray:
    """Row, column to level-0 x, y: each rounded from µm by itself, so that no step drifts."""
    return np.round(np.asarray(grid)[:, ::-1] * cell_um / slide_mpp).astype(np.int64)


def _recipe(slide: Mapping[str, Any], made_by: Any) -> str:
    """Of one slide's features: its pixels, and what encoded them."""
    pixels = {kind: slide[kind]["sha256"] for kind in ("fields", "views") if slide[kind]["records"]}
    return digest({"pixels": pixels, "made_by": made_by, "version": VERSION})


def _attrs(slide: Mapping[str, Any], encoder: str, mpp: float, recipe: str) -> dict[str, Any]:
    return {
        **feature_files.coordinate_attrs(
            slide_id=slide["slide_id"],
            mpp=mpp,
            slide_mpp=slide["slide_mpp"],
            level0_size=slide["level0_size"],
        ),
        "encoder": encoder,
        "recipe": recipe,
    }


# ---- region encoders -------------------------------------------------------------------------------


def extract_regions(
    regions_dir: str | Path, workdir: str | Path, *, batch: int = 8, progress: bool = True
) -> Extracted:
    """Multi-scale tokens of every region, one bag a slide, beside the grid the regions came from.

    Tokens whose `valid` is false leave the bag. Prompt tokens take their region's coordinates.
    """
    regions_dir = Path(regions_dir)
    model = load(workdir)
    if model.record != "regions":
        raise UserError(f"{model.name} encodes images, not regions", "Extract with --fields")
    source = RegionSource(regions_dir, model.columns)
    grid_dir = regions_dir.parent
    mpp = float(read_json(grid_dir / "recipe.json")["mpp"]) * 4
    out = folder(grid_dir, model.name, mpp)
    slides = sorted(set(source.index.slide_id.tolist()))
    done, errors = 0, []
    for slide_id in tqdm(slides, desc="extract regions", disable=not progress, unit="slide"):
        slide = read_json(fields.sidecar_path(grid_dir, slide_id))
        recipe = _recipe(slide, [model.name, regions_dir.name])
        if feature_files.recipe_of(out / f"{slide_id}.h5") == recipe:
            continue
        mine = np.flatnonzero(source.index.slide_id == slide_id)
        try:
            tokens, cells, kind = _encode_regions(model, source, mine, batch)
            write_features(
                out / f"{slide_id}.h5",
                features=tokens,
                coords=level0(cells, 256 * mpp, slide["slide_mpp"]),
                grid=cells,
                kind=kind,
                attrs=_attrs(slide, model.name, mpp, recipe),
            )
            done += 1
        except UserError as error:
            errors.append({"slide_id": slide_id, "reason": error.problem, "cure": error.cure})
    skipped = len(slides) - done - len(errors)
    return Extracted({(model.name, mpp): out}, errors, done, skipped)


def _encode_regions(
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
