"""Which slides to show attention for, and their heatmaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pathme_jax.files import read_csv
from pathme_jax.records.features import SPATIAL
from pathme_jax.reports import figures

SHOWN = 2  # of the surest right, and as many of the worst wrong
SIDE = 560  # px of the pictures


def heatmaps(run: Path, metrics: dict[str, Any], pictures: Path | None) -> list[dict[str, Any]]:
    """The surest right and the worst wrong slides of a MIL run: id, label, score, picture, heatmap.

    Slides without a picture or of unknown size (foreign feature files) are passed over.
    """
    if pictures is None:
        return []
    rows = read_csv(run / "predictions.csv")
    own = {id(row): float(row[f"score_{row['label']}"]) for row in rows}
    best = {id(row): max(float(row[f"score_{c}"]) for c in metrics["classes"]) for row in rows}
    right = sorted((r for r in rows if own[id(r)] == best[id(r)]), key=lambda r: -own[id(r)])
    wrong = sorted((r for r in rows if own[id(r)] < best[id(r)]), key=lambda r: own[id(r)])
    shown = []
    for kind, candidates in (("right", right), ("wrong", wrong)):
        found = 0
        for row in candidates:
            drawn = _draw(run, row["slide_id"].split(";")[0], pictures) if found < SHOWN else None
            if drawn:
                found += 1
                shown.append(drawn | {"kind": kind, "label": row["label"], "score": own[id(row)]})
    return shown


def _draw(run: Path, slide_id: str, pictures: Path) -> dict[str, Any] | None:
    thumbnail = figures.read_picture(pictures / f"{slide_id}.jpg", SIDE)
    file_name = run / "attention" / f"{slide_id}.h5"
    if thumbnail is None or not file_name.exists():
        return None
    with h5py.File(file_name, "r") as file:
        spatial = np.asarray(file["kind"]) == SPATIAL  # prompt tokens have no place of their own
        coords, attention = np.asarray(file["coords"]), np.asarray(file["attention"])
        attrs: dict[str, Any] = dict(file["coords"].attrs)
    needed = ("patch_size_level0", "level0_width", "level0_height")
    if not spatial.any() or any(key not in attrs for key in needed):
        return None
    size, width, height = (int(attrs[key]) for key in needed)
    return {
        "slide_id": slide_id,
        "picture": figures.encode_jpeg(thumbnail),
        "heatmap": figures.attention_overlay(
            thumbnail, coords[spatial], attention[spatial], size, (width, height)
        ),
    }
