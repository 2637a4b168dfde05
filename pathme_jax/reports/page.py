"""The report: one HTML page with everything in it, to be read by a pathologist, on a screen or a phone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pathme_jax.reports import evidence, figures, plots, sections, words
from pathme_jax.reports.attention import Pictures
from pathme_jax.slides.listing import find_slides

PICTURES = 12  # slides shown; the others are counted


@dataclasses.dataclass
class Report:
    """What the page tells; every part may be empty.

    Attributes:
        title: heading.
        synthetic: the slides are generated, and their truth known.
        results: task → kind of bag → the task's folder in a slide-level run (<run>/<task>), in the order of the rows.
        comparisons: task → rows {first, second, difference, interval, permutation_p}, named by kind of bag.
        slides: rows of slides.csv; `slide_id` names the pictures.
        overviews: folder of `<slide_id>.jpg` with the tissue outlined.
        thumbnails: folder of `<slide_id>.jpg` without, under the heatmaps.
        whole_slides: folder or CSV of the slides themselves, which the most attended tiles are cut out of.
        errors: rows `slide_id, reason, cure`.
        training: name of a training run → its metrics.jsonl.
        recipe: settings, name → value.
        versions: package → version.
        notes: further sentences to read before the results.
    """

    title: str
    synthetic: bool = False
    results: dict[str, dict[str, Path]] = dataclasses.field(default_factory=dict)
    comparisons: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    slides: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    overviews: Path | None = None
    thumbnails: Path | None = None
    whole_slides: Path | None = None
    errors: list[dict[str, str]] = dataclasses.field(default_factory=list)
    training: dict[str, Path] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def write(path: str | Path, content: Report) -> None:
    """Writes one self-contained page: pictures inside, no script, nothing loaded from elsewhere."""
    pictures = Pictures(
        content.thumbnails or content.overviews,
        {slide.slide_id: slide for slide in find_slides(content.whole_slides)}
        if content.whole_slides
        else {},
    )
    tasks = [
        sections.task(name, rows, pictures, content.comparisons.get(name, ()))
        for name, rows in content.results.items()
    ]
    sections.write(
        path,
        "page.html",
        report=content,
        tasks=tasks,
        left_out=sections.left_out(tasks),
        overviews=_overviews(content),
        columns=list(dict.fromkeys(key for row in content.slides for key in row)),
        training=[_training(name, file) for name, file in content.training.items()],
    )


def _overviews(content: Report) -> list[dict[str, Any]]:
    """The first slides whose picture is there."""
    shown = []
    for row in content.slides:
        if content.overviews is None or len(shown) == PICTURES:
            break
        image = figures.picture(content.overviews / f"{row['slide_id']}.jpg")
        if image:
            shown.append({"slide_id": row["slide_id"], "image": image})
    return shown


def _training(name: str, file: Path) -> dict[str, Any]:
    """Panels of one training run: losses, and the diagnostics that show a collapse."""
    records = [json.loads(line) for line in Path(file).read_text().splitlines() if line.strip()]
    keys = list(dict.fromkeys(key for record in records for key in record))

    def panels(wanted: list[str]) -> list[dict[str, Any]]:
        found = []
        for key in wanted:
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                label = words.metric_name(key)
                alt = f"{label} over training steps, from {values[0]:.3g} to {values[-1]:.3g}"
                drawn = evidence.Drawn(
                    key, plots.curve(steps, values, label), alt, words.bad_sign(key) or ""
                )
                found.append(sections.image(drawn))
        return found

    return {
        "name": name,
        "steps": records[-1]["step"] + 1 if records else 0,  # counted from 0
        "losses": panels([k for k in keys if k == "loss" or k.startswith("loss/")]),
        "diagnostics": panels([k for k in keys if words.bad_sign(k)]),
    }
