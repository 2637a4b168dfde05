"""What tiling would do, without writing anything (`--dry-run`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pathme_jax.slides import tissue
from pathme_jax.slides.plan import Recipe, make_plan, missing_regions
from pathme_jax.slides.reader import level_for, open_slide, read_scaled
from pathme_jax.slides.tile import CRASHED, Job, explain, finished, make_jobs
from pathme_jax.workers import each


def preview(
    slides: str | Path,
    out: str | Path,
    *,
    mpp_csv: str | Path | None = None,
    tissue_dir: str | Path | None = None,
    workers: int = 2,
    **recipe: Any,
) -> str:
    """What `run` would do with the same arguments, a line per slide; writes nothing.

    Raises:
        UserError: wrong arguments.
    """
    jobs = make_jobs(slides, out, mpp_csv, Recipe(**recipe))
    if tissue_dir:
        theirs = [Path(tissue_dir) / job.outlines.name for job in jobs]
        jobs = [
            dataclasses.replace(job, outlines=path) if path.exists() else job
            for job, path in zip(jobs, theirs, strict=True)
        ]
    lines = each(_preview_slide, jobs, crashed=_crashed_line, workers=workers, progress=False)
    head = ("slide", "state", "mpp", "level", "grid", "fields", "tiles", "regions", "reason")
    table = [head, *sorted(lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def _preview_slide(job: Job) -> tuple[str, ...]:
    name = job.slide.slide_id
    try:
        with open_slide(job.slide.path, job.slide.mpp) as slide:
            level = level_for(slide, job.recipe.mpp, job.recipe.max_upsample)
            if tissue.reusable(job.outlines, job.source()):
                polygons = tissue.read(job.outlines)
            else:
                mask = tissue.segment(read_scaled(slide, tissue.RECIPE["mpp"]))
                polygons = tissue.outlines(mask, slide.mpp)
            plan = make_plan(slide, level, polygons, job.recipe)
            reason, _ = missing_regions(plan)
            state = "done" if finished(job) else "no_region" if reason else "to do"
            return (
                name,
                state,
                f"{slide.mpp:.4g}",
                f"{level} ({slide.level_mpps[level]:.4g} µm)",
                "{} × {}".format(*plan.grid.shape),
                str(len(plan.fields)),
                str(plan.tissue.sum()),
                str(len(plan.regions)),
                reason,
            )
    except Exception as error:
        return _failed_line(job, explain(error)[0])


def _failed_line(job: Job, reason: str) -> tuple[str, ...]:
    return (job.slide.slide_id, "failed", *[""] * 6, reason)


def _crashed_line(job: Job) -> tuple[str, ...]:
    return _failed_line(job, CRASHED.problem)
