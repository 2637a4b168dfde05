"""The report: one HTML page with everything in it, to be read by a pathologist, on a screen or a phone."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pathme_jax.files import atomic, read_csv, read_json
from pathme_jax.reports import figures, words
from pathme_jax.reports.attention import heatmaps

PICTURES = 12  # slides shown; the others are counted


@dataclasses.dataclass
class Report:
    """What the page tells; every part may be empty.

    Attributes:
        title: heading.
        synthetic: the slides are generated, and their truth known.
        results: task → kind of bag → folder of a MIL run, in the order of the rows.
        slides: rows of slides.csv; `slide_id` names the pictures.
        overviews: folder of `<slide_id>.jpg` with the tissue outlined.
        thumbnails: folder of `<slide_id>.jpg` without, under the heatmaps.
        errors: rows `slide_id, reason, cure`.
        training: name of a training run → its metrics.jsonl.
        recipe: settings, name → value.
        versions: package → version.
        notes: further sentences to read before the results.
    """

    title: str
    synthetic: bool = False
    results: dict[str, dict[str, Path]] = dataclasses.field(default_factory=dict)
    slides: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    overviews: Path | None = None
    thumbnails: Path | None = None
    errors: list[dict[str, str]] = dataclasses.field(default_factory=list)
    training: dict[str, Path] = dataclasses.field(default_factory=dict)
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def write(path: str | Path, content: Report) -> None:
    """Writes one self-contained page: pictures inside, no script, nothing loaded from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["image"] = _data_uri
    tasks = [_task(name, rows, content) for name, rows in content.results.items()]
    page = environment.get_template("page.html").render(
        report=content,
        tasks=tasks,
        few=[task for task in tasks if task["few"]],
        overviews=_overviews(content),
        columns=list(dict.fromkeys(key for row in content.slides for key in row)),
        training=[_training(name, file) for name, file in content.training.items()],
        words=words,
    )
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _data_uri(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _task(name: str, rows: Mapping[str, Path], content: Report) -> dict[str, Any]:
    metrics = {bag: read_json(Path(folder) / "metrics.json") for bag, folder in rows.items()}
    last = list(rows)[-1]
    any_row = metrics[last]
    return {
        "name": name,
        "metrics": metrics,
        "classes": any_row["cases_per_class"],
        "cases": any_row["cases"],
        "few": any(each["too_few_to_judge"] for each in metrics.values()),
        "verdict": words.verdict(name, metrics),
        "roc": figures.roc({bag: _roc(Path(rows[bag]), metrics[bag]) for bag in rows}),
        "heatmap_bag": last,
        "heatmaps": heatmaps(Path(rows[last]), any_row, content.thumbnails or content.overviews),
        "left_out": {
            problem["slide_id"]: problem
            for each in metrics.values()
            for problem in each["problems"]
        },
    }


def _roc(folder: Path, metrics: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    from pathme_jax.evaluation.auroc import roc

    rows = read_csv(folder / "cases.csv")
    classes = metrics["classes"]
    return roc(
        np.array([[float(row[f"score_{c}"]) for c in classes] for row in rows]),
        np.array([classes.index(row["label"]) for row in rows]),
        np.array([int(row["fold"]) for row in rows]),
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
                image = figures.curve(steps, values, words.metric_name(key))
                ends = {"first": values[0], "last": values[-1], "bad": words.bad_sign(key)}
                found.append({"key": key, "image": image} | ends)
        return found

    return {
        "name": name,
        "steps": records[-1]["step"] + 1 if records else 0,  # counted from 0
        "losses": panels([k for k in keys if k == "loss" or k.startswith("loss/")]),
        "diagnostics": panels([k for k in keys if words.bad_sign(k)]),
    }
