"""Where tiles come from: fields that were stored, or the slides themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.files import read_json
from pathme_jax.records import fields
from pathme_jax.slides import tile, tissue
from pathme_jax.slides.grid import SPAN
from pathme_jax.slides.pixels import VIEW_PX, field_pixels, view_pixels
from pathme_jax.slides.plan import Plan, Recipe, make_plan
from pathme_jax.slides.reader import OpenSlideReader, level_for, open_slide
from pathme_jax.workers import each

LADDER = (1, 4, 16)  # magnifications, as multiples of the finest µm/px
OPEN_SLIDES = 2  # a process's; each keeps up to reader.CACHE_BYTES of decoded pixels
Failure = dict[str, str]  # slide_id, reason, cure


def failure(slide_id: str, error: Exception) -> Failure:
    reason, cure = tile.explain(error)
    return {"slide_id": slide_id, "reason": reason, "cure": cure}


@dataclasses.dataclass(frozen=True)
class Slide:
    """One slide's tiles.

    Attributes:
        pixels: all that decides them, JSON-able.
        slide_mpp: µm per level-0 pixel. level0_size: (width, height).
        tiles, fields, regions: how many there are.
        names: of the tiles, where they were files of a folder.
    """

    slide_id: str
    pixels: Any
    slide_mpp: float
    level0_size: tuple[int, int]
    tiles: int
    fields: int
    regions: int
    names: Sequence[str] = ()

    def count(self, multiple: int) -> int:
        """Tiles at that multiple of the finest µm/px."""
        return {1: self.tiles, 4: self.fields, 16: self.regions}[multiple]


class Store(Protocol):
    """Where pixels come from; picklable, read by many threads and processes.

    Attributes:
        grid_dir: the folder of this grid. mpp: the finest µm/px. tile_px: side of every tile.
        multiples: of `mpp` that it can serve.
    """

    grid_dir: Path
    mpp: float
    tile_px: int
    multiples: Sequence[int]

    @property
    def slide_ids(self) -> Sequence[str]: ...

    def pixels(self, slide_id: str) -> Any:
        """`Slide.pixels`, or None where it is not known before `plan`."""
        ...

    def start(self) -> None:
        """Makes the grid's folder ready. Before anything below but `sizes`."""
        ...

    def sizes(self) -> list[Slide]:
        """The slides whose tiles are known already. Writes nothing."""
        ...

    def plan(
        self, slide_ids: Sequence[str], workers: int, progress: bool
    ) -> tuple[list[Slide], list[Failure]]:
        """What there is to read of these slides, and those that cannot be read."""
        ...

    def field(self, slide_id: str, i: int) -> tuple[np.ndarray, Sequence[int], np.ndarray]:
        """Image, (row, column), tissue tiles (side, side) bool of a slide's field i."""
        ...

    def view(self, slide_id: str, i: int) -> tuple[np.ndarray, Sequence[int]]:
        """Image (tile_px, tile_px, 3) and (row, column) of a slide's region i."""
        ...

    def close(self) -> None:
        """Closes what this process holds open."""
        ...


# ---- from stored fields ----------------------------------------------------------------------------


class FieldStore:
    """What `data_prep.tile` wrote."""

    def __init__(self, grid_dir: str | Path):
        """Raises UserError where tiling never finished."""
        self.grid_dir = Path(grid_dir)
        self.slide_ids = fields.tiled_slides(grid_dir)
        recipe = read_json(self.grid_dir / "recipe.json")
        self.mpp, self.tile_px = float(recipe["mpp"]), int(recipe["tile_px"])
        self.multiples: Sequence[int] = LADDER
        if recipe["field_px"] != SPAN * self.tile_px:
            self.multiples = LADDER[:1]  # patches, which are no part of anything coarser
        elif self.tile_px > VIEW_PX:
            self.multiples = LADDER[:2]  # region views are not stored that large
        self._failures: dict[str, Failure] = {}
        try:
            self._open(self.slide_ids)
        except UserError:
            self._open([slide_id for slide_id in self.slide_ids if self._readable(slide_id)])

    def _open(self, slide_ids: Sequence[str]) -> None:
        self._fields = fields.FieldSource(self.grid_dir, slide_ids)
        self._views = fields.ViewSource(self.grid_dir, slide_ids)

    def _readable(self, slide_id: str) -> bool:
        try:
            self._open([slide_id])
        except UserError as error:
            self._failures[slide_id] = failure(slide_id, error)
            return False
        return True

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def pixels(self, slide_id: str) -> Any:
        if slide_id in self._failures:
            return None
        sidecar = self._fields.sidecars[slide_id]
        kinds = (fields.FIELDS, fields.VIEWS)
        return {kind: sidecar[kind]["sha256"] for kind in kinds if sidecar[kind]["records"]}

    def sizes(self) -> list[Slide]:
        return [self._slide(s) for s in self.slide_ids if s not in self._failures]

    def plan(
        self, slide_ids: Sequence[str], workers: int, progress: bool
    ) -> tuple[list[Slide], list[Failure]]:
        whole = [self._slide(s) for s in slide_ids if s not in self._failures]
        return whole, [self._failures[s] for s in slide_ids if s in self._failures]

    def _slide(self, slide_id: str) -> Slide:
        sidecar = self._fields.sidecars[slide_id]
        return Slide(
            slide_id,
            self.pixels(slide_id),
            sidecar["slide_mpp"],
            tuple(sidecar["level0_size"]),
            sidecar["tiles"],
            sidecar[fields.FIELDS]["records"],
            sidecar[fields.VIEWS]["records"],
            sidecar.get("names", ()),
        )

    def field(self, slide_id: str, i: int) -> tuple[np.ndarray, Sequence[int], np.ndarray]:
        record = self._fields[self._fields.ranges[slide_id][i]]
        tissue = np.asarray(record["tissue"], bool)
        return fields.decode(record["image"]), record["grid"], tissue

    def view(self, slide_id: str, i: int) -> tuple[np.ndarray, Sequence[int]]:
        record = self._views[self._views.ranges[slide_id][i]]
        image = fields.decode(record["image"])
        size = (self.tile_px, self.tile_px)
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA), record["grid"]


# ---- from slides -----------------------------------------------------------------------------------


class SlideStore:
    """The slides themselves, read where tiling would read them: the same pixels, without JPEG between.

    Args:
        slides, out, mpp_csv, tissue_dir: see `slides.tile.run`.
        recipe: attributes of `slides.plan.Recipe`.

    Raises:
        UserError: wrong arguments.
    """

    def __init__(
        self,
        slides: str | Path,
        out: str | Path,
        *,
        mpp_csv: str | Path | None = None,
        tissue_dir: str | Path | None = None,
        **recipe: Any,
    ):
        self.recipe = Recipe(**recipe)
        self.jobs = {
            job.slide.slide_id: job for job in tile.make_jobs(slides, out, mpp_csv, self.recipe)
        }
        self.slide_ids = list(self.jobs)
        self.grid_dir = next(iter(self.jobs.values())).grid_dir
        self.mpp, self.tile_px = self.recipe.mpp, self.recipe.tile_px
        self.multiples: Sequence[int] = LADDER
        self.tissue_dir = tissue_dir
        self.plans: dict[str, Plan] = {}  # of the slides that `plan` was asked for

    def start(self) -> None:
        """Brings in the outlines that were given, too."""
        tile.start(list(self.jobs.values()), self.tissue_dir)

    def pixels(self, slide_id: str) -> Any:
        job = self.jobs[slide_id]
        try:
            return job.inputs() if tissue.reusable(job.outlines, job.source()) else None
        except (OSError, UserError):  # `plan` tells of it
            return None

    def sizes(self) -> list[Slide]:
        found = []
        for slide_id, job in self.jobs.items():
            if (inputs := self.pixels(slide_id)) is None:
                continue
            with contextlib.suppress(UserError), open_slide(job.slide.path, job.slide.mpp) as slide:
                level = level_for(slide, self.mpp, self.recipe.max_upsample)
                plan = make_plan(slide, level, tissue.read(job.outlines), self.recipe)
                found.append(_slide(job, inputs, slide.mpp, plan))
        return found

    def plan(
        self, slide_ids: Sequence[str], workers: int, progress: bool
    ) -> tuple[list[Slide], list[Failure]]:
        jobs = [self.jobs[slide_id] for slide_id in slide_ids]
        found = each(
            _survey, jobs, crashed=_crashed, workers=workers, progress=progress, label="plan"
        )
        planned = [x for x in found if isinstance(x, tuple)]
        self.plans = {slide.slide_id: plan for slide, plan in planned}
        slides = sorted((slide for slide, _ in planned), key=lambda slide: slide.slide_id)
        return slides, [x for x in found if isinstance(x, dict)]

    def field(self, slide_id: str, i: int) -> tuple[np.ndarray, Sequence[int], np.ndarray]:
        plan, at = self.plans[slide_id], self.plans[slide_id].fields[i].tolist()
        return field_pixels(self._reader(slide_id), plan, at, self.recipe), at, plan.tissue[i]

    def view(self, slide_id: str, i: int) -> tuple[np.ndarray, Sequence[int]]:
        plan, at = self.plans[slide_id], self.plans[slide_id].regions[i]
        return view_pixels(self._reader(slide_id), plan, at, self.recipe, self.tile_px), at

    def _reader(self, slide_id: str) -> OpenSlideReader:
        slide = self.jobs[slide_id].slide
        return _opened(str(slide.path), slide.mpp)

    def close(self) -> None:
        """Closes the slides that this process holds open."""
        _opened.cache_clear()


@functools.lru_cache(maxsize=OPEN_SLIDES)
def _opened(path: str, mpp: float | None) -> OpenSlideReader:
    return OpenSlideReader(path, mpp)


def _survey(job: tile.Job) -> tuple[Slide, Plan] | Failure:
    """Finds what there is to read of a slide, and writes its pictures, outlines and coordinates."""
    slide_id = job.slide.slide_id
    try:
        with open_slide(job.slide.path, job.slide.mpp) as slide:
            plan, thumbnail = tile.survey(slide, job)
            tile.write_coordinates(slide, plan, thumbnail, job)
            return _slide(job, job.inputs(), slide.mpp, plan), plan
    except Exception as error:
        tile.raise_if_full(error)
        return failure(slide_id, error)


def _slide(job: tile.Job, inputs: Any, mpp: float, plan: Plan) -> Slide:
    counts = (int(plan.tissue.sum()), len(plan.fields), len(plan.regions))
    return Slide(job.slide.slide_id, inputs, mpp, plan.grid.size, *counts)


def _crashed(job: tile.Job) -> Failure:
    return failure(job.slide.slide_id, tile.CRASHED)
