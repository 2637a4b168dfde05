"""From slides to fields: tissue, grid, pixels, and the tables that say what came of each slide.

    OUT/thumbnails/<slide>.jpg   OUT/contours/<slide>.jpg   OUT/contours_geojson/<slide>.geojson
    OUT/20x-1a2b3c4d/            one folder per recipe; see `records.fields` and `records.features`
        recipe.json  slides.csv  errors.csv  fields/  views/  visualization/  tfds/
        20x_256px_0px_overlap/patches/<slide>_patches.h5

A slide is done when its sidecar `fields/<slide>.json` is there and names this recipe, this file and
these outlines; a run does what is not done. Times stand in slides.csv only.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, read_csv, read_json, write_csv, write_json
from pathme_jax.records import features, fields
from pathme_jax.slides import pictures, tissue
from pathme_jax.slides.grid import SPAN, Grid, tile_cells
from pathme_jax.slides.listing import SlideFile, find_slides, fingerprint
from pathme_jax.slides.pixels import field_pixels, view_mpp, view_pixels
from pathme_jax.slides.plan import Plan, Recipe, make_plan, missing_regions
from pathme_jax.slides.reader import Reader, level_for, open_slide, read_scaled
from pathme_jax.workers import each

SLIDE_COLUMNS = [
    *("slide_id", "path", "state", "mpp", "level0_width", "level0_height"),
    *("fields", "tiles", "regions", "seconds"),
]
ERROR_COLUMNS = ["slide_id", "reason", "cure"]
CRASHED = UserError(
    "reading it ended the worker process (out of memory, or a corrupt file)",
    "Try --workers 1, or copy the slide again from its source",
)


@dataclasses.dataclass(frozen=True)
class Tiled:
    """What came of a run: rows of slides.csv and of errors.csv."""

    grid_dir: Path
    slides: list[dict[str, Any]]
    errors: list[dict[str, Any]]

    def __str__(self) -> str:
        done = [row for row in self.slides if row["state"] in fields.DONE_STATES]
        count = sum(row["fields"] for row in done)
        lines = [f"{len(done)} of {len(self.slides)} slides tiled, {count} fields: {self.grid_dir}"]
        lines += [f"  {e['slide_id']}: {e['reason']}. {e['cure']}" for e in self.errors]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Job:
    """One slide to tile, and where everything of it goes.

    Attributes:
        outlines: its tissue, GeoJSON; written where it is missing.
    """

    slide: SlideFile
    out: Path
    recipe: Recipe
    outlines: Path

    @property
    def grid_dir(self) -> Path:
        return self.out / self.recipe.folder

    def picture(self, folder: Path) -> Path:
        return folder / f"{self.slide.slide_id}.jpg"

    @property
    def sidecar(self) -> Path:
        return fields.sidecar_path(self.grid_dir, self.slide.slide_id)

    def shard(self, kind: str) -> Path:
        return self.grid_dir / kind / f"{self.slide.slide_id}.array_record"

    @property
    def patches(self) -> Path:
        folder = features.folder_name(self.recipe.mpp, self.recipe.tile_px)
        return self.grid_dir / folder / "patches" / f"{self.slide.slide_id}_patches.h5"

    def inputs(self) -> dict[str, Any]:
        """All that the output depends on. Raises OSError where the slide cannot be read."""
        outlines = self.outlines.read_bytes() if self.outlines.exists() else b""
        return {
            "recipe": self.recipe.hash8,
            "source": self.source(),
            "outlines": hashlib.sha256(outlines).hexdigest()[:16],
        }

    def source(self) -> dict[str, Any]:
        return {**fingerprint(self.slide.path), "mpp": self.slide.mpp}


def run(
    slides: str | Path,
    out: str | Path,
    *,
    mpp_csv: str | Path | None = None,
    tissue_dir: str | Path | None = None,
    workers: int = 2,
    progress: bool = True,
    **recipe: Any,
) -> Tiled:
    """Tiles every slide that is not done; bad slides are listed and do not stop the others.

    Args:
        slides: folder or CSV, see `listing.find_slides`.
        out: where everything goes.
        mpp_csv: µm per level-0 pixel of slides that do not state it.
        tissue_dir: `<slide>.geojson` outlines that replace ours.
        workers: processes; 0 or 1 works in this one.
        recipe: attributes of `plan.Recipe`, such as mpp=0.5.

    Raises:
        UserError: wrong arguments, or no slide at all could be tiled.
        OSError: the disk is full.
    """
    jobs = make_jobs(slides, out, mpp_csv, Recipe(**recipe))
    grid_dir = start(jobs, tissue_dir)
    before = _seconds_before(grid_dir)
    rows, pending = [], []
    for job in jobs:
        sidecar = finished(job)
        if sidecar is None:
            pending.append(job)
        else:
            rows.append({**_row(sidecar), "seconds": before.get(job.slide.slide_id, "")})
    rows += each(tile_slide, pending, crashed=_crashed, workers=workers, progress=progress)
    return _finish(grid_dir, sorted(rows, key=lambda row: row["slide_id"]))


def make_jobs(
    slides: str | Path, out: str | Path, mpp_csv: str | Path | None, recipe: Recipe
) -> list[Job]:
    """A job per slide, by slide_id. Raises UserError on wrong arguments."""
    recipe.check()
    contours = Path(out) / "contours_geojson"
    return [
        Job(slide, Path(out), recipe, contours / f"{slide.slide_id}.geojson")
        for slide in find_slides(slides, mpp_csv)
    ]


def start(jobs: list[Job], tissue_dir: str | Path | None) -> Path:
    """Brings outlines in and writes the recipe; the grid folder."""
    if tissue_dir:
        _bring_in(Path(tissue_dir), jobs)
    grid_dir = jobs[0].grid_dir
    if not (grid_dir / "recipe.json").exists():
        write_json(grid_dir / "recipe.json", jobs[0].recipe.content())
    return grid_dir


def _bring_in(folder: Path, jobs: list[Job]) -> None:
    found = 0
    for job in jobs:
        theirs = folder / job.outlines.name
        if theirs.exists():
            found += 1
            content = theirs.read_bytes()
            if not job.outlines.exists() or job.outlines.read_bytes() != content:
                with atomic(job.outlines) as temporary:
                    temporary.write_bytes(content)
    if not found:
        raise UserError(
            f"{folder}: no outline of any of the {len(jobs)} slides",
            f"--tissue needs files named after slides, such as {jobs[0].outlines.name}",
        )


def finished(job: Job) -> dict[str, Any] | None:
    """The sidecar of a slide that needs no more work, else None."""
    try:
        sidecar = read_json(job.sidecar)
        if sidecar["inputs"] != job.inputs():
            return None
        for kind in (fields.FIELDS, fields.VIEWS):
            if sidecar[kind]["records"] and (
                job.shard(kind).stat().st_size != sidecar[kind]["bytes"]
            ):
                return None
    except (OSError, ValueError, KeyError):
        return None
    return sidecar if job.patches.exists() else None


def _row(sidecar: dict[str, Any]) -> dict[str, Any]:
    width, height = sidecar["level0_size"]
    return {
        **{key: sidecar[key] for key in ("slide_id", "path", "state", "reason", "cure")},
        "mpp": sidecar["slide_mpp"],
        "level0_width": width,
        "level0_height": height,
        "fields": sidecar[fields.FIELDS]["records"],
        "tiles": sidecar["tiles"],
        "regions": sidecar[fields.VIEWS]["records"],
    }


def _seconds_before(grid_dir: Path) -> dict[str, str]:
    table = grid_dir / "slides.csv"
    rows = read_csv(table) if table.exists() else []
    return {row["slide_id"]: row["seconds"] for row in rows}


def _finish(grid_dir: Path, rows: list[dict[str, Any]]) -> Tiled:
    errors = [row for row in rows if row["reason"]]
    tiled = [row["slide_id"] for row in rows if row["state"] in fields.DONE_STATES]
    if tiled:
        sidecars = {s: read_json(fields.sidecar_path(grid_dir, s)) for s in tiled}
        fields.write_tfds(grid_dir, sidecars)
    write_csv(grid_dir / "errors.csv", errors, ERROR_COLUMNS)
    write_csv(grid_dir / "slides.csv", rows, SLIDE_COLUMNS)
    if not tiled:
        first = errors[0]
        raise UserError(
            f"none of the {len(rows)} slides could be tiled; {first['slide_id']}: {first['reason']}",
            f"{first['cure']}. All reasons and cures: {grid_dir / 'errors.csv'}",
        )
    return Tiled(grid_dir, rows, errors)


# --- one slide


def tile_slide(job: Job) -> dict[str, Any]:
    """Tiles one slide and returns its row; a slide that cannot be tiled leaves nothing behind."""
    start = time.perf_counter()
    try:
        row = _row(_tile(job))
    except Exception as error:
        raise_if_full(error)
        row = _failed(job, error)
    return {**row, "seconds": round(time.perf_counter() - start, 2)}


def _crashed(job: Job) -> dict[str, Any]:
    return _failed(job, CRASHED)


def _failed(job: Job, error: Exception) -> dict[str, Any]:
    """The row of a slide that failed; removes what an earlier run left of it in this grid."""
    for path in (job.sidecar, job.shard(fields.FIELDS), job.shard(fields.VIEWS), job.patches):
        path.unlink(missing_ok=True)
    job.picture(job.grid_dir / "visualization").unlink(missing_ok=True)
    reason, cure = explain(error)
    return {
        **dict.fromkeys(SLIDE_COLUMNS, ""),
        "slide_id": job.slide.slide_id,
        "path": str(job.slide.path),
        "state": "failed",
        "reason": reason,
        "cure": cure,
    }


def raise_if_full(error: Exception) -> None:
    """A full disk ends the run: it is no fault of a slide."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise error


def explain(error: Exception) -> tuple[str, str]:
    """Reason and cure of a slide's failure."""
    if isinstance(error, UserError):
        return error.problem, error.cure
    if isinstance(error, OSError):
        return str(error), "Check that the file is there and may be read"
    what = f"{type(error).__name__}: {error}"
    return what, "This is a fault of pathme_jax: please report it with the slide"


def survey(slide: Reader, job: Job) -> tuple[Plan, np.ndarray]:
    """What to read of a slide, and its thumbnail; writes thumbnail, outlines and their picture if need be.

    Raises:
        UserError: too coarse, no tissue, smaller than a field.
    """
    level = level_for(slide, job.recipe.mpp, job.recipe.max_upsample)
    thumbnail = _thumbnail(slide, job)
    polygons = tissue.read(job.outlines)
    contours = job.picture(job.out / "contours")
    if not contours.exists() or contours.stat().st_mtime < job.outlines.stat().st_mtime:
        scale = slide.mpp / tissue.RECIPE["mpp"]
        pictures.save(contours, pictures.draw_outlines(thumbnail, polygons, scale))
    return make_plan(slide, level, polygons, job.recipe), thumbnail


def write_coordinates(slide: Reader, plan: Plan, thumbnail: np.ndarray, job: Job) -> np.ndarray:
    """Where the tiles are: TRIDENT's file of coordinates, and the overview. Returns `tile_cells`."""
    tiles = tile_cells(plan.fields, plan.tissue)
    attrs = features.coordinate_attrs(
        slide_id=job.slide.slide_id,
        mpp=job.recipe.mpp,
        slide_mpp=slide.mpp,
        level0_size=plan.grid.size,
        px=job.recipe.tile_px,
    )
    features.write_coords(job.patches, plan.grid.tile_coords(tiles), attrs)
    overview = pictures.draw_grid(
        thumbnail, tissue.RECIPE["mpp"], plan.grid, plan.fields, plan.tissue, plan.regions
    )
    pictures.save(job.picture(job.grid_dir / "visualization"), overview)
    return tiles


def _tile(job: Job) -> dict[str, Any]:
    with open_slide(job.slide.path, job.slide.mpp) as slide:
        plan, thumbnail = survey(slide, job)
        inputs = job.inputs()
        job.sidecar.unlink(missing_ok=True)
        stored = fields.write_shard(job.shard(fields.FIELDS), _field_records(slide, plan, job))
        if plan.regions:
            views = fields.write_shard(job.shard(fields.VIEWS), _view_records(slide, plan, job))
        else:
            views = {"records": 0, "bytes": 0, "sha256": ""}
            job.shard(fields.VIEWS).unlink(missing_ok=True)
        tiles = write_coordinates(slide, plan, thumbnail, job)
        reason, cure = missing_regions(plan)
        sidecar = {
            "slide_id": job.slide.slide_id,
            "path": str(job.slide.path),
            "state": "no_region" if reason else "done",
            "reason": reason,
            "cure": cure,
            "slide_mpp": slide.mpp,
            "level0_size": list(plan.grid.size),
            "level": plan.level,
            "grid": list(plan.grid.shape),
            fields.FIELDS: stored,
            fields.VIEWS: views,
            "tiles": len(tiles),
            "inputs": inputs,
        }
        write_json(job.sidecar, sidecar)
    return sidecar


def _thumbnail(slide: Reader, job: Job) -> np.ndarray:
    """The slide at the tissue's µm/px; finds the tissue unless outlines are there that stand."""
    path, source = job.picture(job.out / "thumbnails"), job.source()
    found = tissue.reusable(job.outlines, source)
    if found and path.exists():
        return pictures.load(path)
    thumbnail = read_scaled(slide, tissue.RECIPE["mpp"])
    pictures.save(path, thumbnail)
    if not found:
        tissue.write(job.outlines, tissue.outlines(tissue.segment(thumbnail), slide.mpp), source)
    return pictures.load(path)  # as a later run will see it


def _field_records(slide: Reader, plan: Plan, job: Job) -> Iterator[bytes]:
    for (row, col), tiles in zip(plan.fields.tolist(), plan.tissue, strict=True):
        image = field_pixels(slide, plan, (row, col), job.recipe)
        common = _common(image, plan.grid, (row, col), 1, job.recipe.mpp, job)
        yield fields.serialise(fields.FIELDS, {**common, "tissue": tiles})


def _view_records(slide: Reader, plan: Plan, job: Job) -> Iterator[bytes]:
    mpp = view_mpp(job.recipe)
    stored = plan.stored()
    for row, col in plan.regions:
        image = view_pixels(slide, plan, (row, col), job.recipe)
        common = _common(image, plan.grid, (row, col), SPAN, mpp, job)
        held = stored[row : row + SPAN, col : col + SPAN]
        yield fields.serialise(fields.VIEWS, {**common, "fields": held})


def _common(
    image: np.ndarray, grid: Grid, at: tuple[int, int], span: int, mpp: float, job: Job
) -> dict[str, Any]:
    x, y, width, height = grid.box(*at, span=span, mpp=grid.slide_mpp)
    return {
        "image": fields.encode(image),
        "slide_id": job.slide.slide_id,
        "grid": np.array(at, np.int32),
        "level0_xy": np.array([x, y], np.int64),
        "level0_size": np.array([width, height], np.int64),
        "mpp": np.float32(mpp),
        "slide_mpp": np.float32(grid.slide_mpp),
        "recipe": job.recipe.hash8,
    }
