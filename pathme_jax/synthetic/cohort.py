"""A cohort of two-scale tissue: slides, labels and survival, with the truth known.

out/recipe.json        what the cohort was made from
out/slides/<id>.tiff   pyramidal TIFFs at 0.5 µm/px
out/labels.csv         case_id, slide_id, detail, architecture, subtype, os_months, os_event
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.files import read_json, write_csv, write_json
from pathme_jax.synthetic.chromatin import AMPLITUDE
from pathme_jax.synthetic.pyramid import QUALITY, write_pyramid
from pathme_jax.synthetic.slide import FIELD, MPP, SlideSpec, field_rows
from pathme_jax.workers import each

DRAWING = 2  # raise it with every change to what is drawn: it is part of the recipe
COLUMNS = ["case_id", "slide_id", "detail", "architecture", "subtype", "os_months", "os_event"]
CELLS = [(0, 0), (0, 1), (1, 0), (1, 1)]  # detail, architecture
HAZARD = 1 / 100  # per month, with both labels 0
RATIO = 2.2  # what each label multiplies the hazard by
FOLLOW_UP = (12.0, 108.0)  # months, censoring is uniform in it


def write_cohort(
    out: Path,
    slides: int = 40,
    size: int = 4096,
    seed: int = 0,
    slides_per_case: int = 2,
    workers: int = 2,
    progress: bool = True,
) -> Path:
    """Writes a cohort into the folder `out` and returns it; slides already there are kept.

    The same arguments give the same bytes, whatever `workers` and however often it was interrupted.

    Args:
        out: folder, made if missing.
        slides: how many.
        size: side of each in px, a multiple of 1024.
        seed: any integer >= 0; another seed is another cohort.
        slides_per_case: consecutive slides of one case share its labels and survival.
        workers: processes.
        progress: show a bar on stderr.

    Raises:
        UserError: an argument out of range, or `out` holds a cohort made otherwise.
    """
    out = Path(out)
    if size < FIELD or size % FIELD:
        raise UserError(
            f"--size {size} is not a multiple of {FIELD} px",
            f"Try {max(FIELD, round(size / FIELD) * FIELD)}",
        )
    for name, value, least in [
        ("slides", slides, 1),
        ("slides-per-case", slides_per_case, 1),
        ("workers", workers, 1),
        ("seed", seed, 0),
    ]:
        if value < least:
            raise UserError(f"--{name} {value} is too small", f"Give at least {least}")
    _claim(out, slides=slides, size=size, seed=seed, slides_per_case=slides_per_case)
    rows = label_table(slides, seed, slides_per_case)
    jobs = [
        (out / "slides" / f"{row['slide_id']}.tiff", SlideSpec((seed, index), size), row)
        for index, row in enumerate(rows)
    ]
    missing = [job for job in jobs if not job[0].exists()]
    each(
        _write_slide,
        missing,
        crashed=_lost,
        workers=workers,
        progress=progress and bool(missing),
        label="synthesize",
    )
    write_csv(out / "labels.csv", rows, COLUMNS)
    return out


def label_table(slides: int, seed: int, slides_per_case: int) -> list[dict[str, Any]]:
    """One row per slide, `COLUMNS` wide. The four label cells differ by at most one case in size.

    Survival is exponential: its hazard is multiplied by `RATIO` for each label that is 1.
    """
    cases = -(-slides // slides_per_case)
    rng = np.random.default_rng([seed, 1_000_000])
    cells = np.concatenate([rng.permutation(4) for _ in range(-(-cases // 4))])[:cases]
    rng.shuffle(cells)
    rows = []
    for case, cell in enumerate(cells):
        detail, architecture = CELLS[cell]
        death = rng.exponential(1 / (HAZARD * RATIO ** (detail + architecture)))
        censoring = rng.uniform(*FOLLOW_UP)
        outcome = {
            "case_id": f"c{case:03d}",
            "detail": detail,
            "architecture": architecture,
            "subtype": detail ^ architecture,
            "os_months": max(0.1, round(min(death, censoring), 1)),
            "os_event": int(death <= censoring),
        }
        first = case * slides_per_case
        for slide in range(first, min(first + slides_per_case, slides)):
            rows.append({**outcome, "slide_id": f"s{slide:04d}"})
    return rows


def _claim(out: Path, **arguments: int) -> None:
    """Makes `out` this recipe's folder, and clears what killed runs left unfinished in it."""
    recipe = {**arguments, "drawing": DRAWING, "amplitude": AMPLITUDE, "jpeg_quality": QUALITY}
    path, folder = out / "recipe.json", out / "slides"
    found = read_json(path) if path.exists() else None
    if found is None and any(folder.glob("*.tiff")):
        raise UserError(
            f"{folder} holds slides, but {path} is missing", "Choose another folder for the cohort"
        )
    if found is not None and found != recipe:
        changed = [
            f"{key} {found.get(key)}, now {recipe.get(key)}"
            for key in sorted({*found, *recipe})
            if found.get(key) != recipe.get(key)
        ]
        raise UserError(
            f"{out} holds a cohort of another recipe ({'; '.join(changed)})",
            "Choose another folder, or delete this one",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".*.tmp.tiff"):
        unfinished.unlink(missing_ok=True)
    if found is None:
        write_json(path, recipe)


def _write_slide(job: tuple[Path, SlideSpec, dict[str, Any]]) -> None:
    path, spec, row = job
    write_pyramid(path, field_rows(spec, row["detail"], row["architecture"]), spec.size, MPP)


def _lost(job: tuple[Path, SlideSpec, dict[str, Any]]) -> None:
    raise UserError(
        f"drawing {job[0].name} ended its process, most likely for lack of memory",
        "Run the same command with --workers 1: finished slides are kept",
    )
