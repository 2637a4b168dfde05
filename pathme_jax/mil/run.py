"""One cross-validation: feature files and labels in, a folder of predictions, metrics and attention out.

    <out>/<task>/<name>-<hash8>/metrics.json predictions.csv cases.csv history.csv attention/<slide>.h5 run.json

The hash names the recipe: settings, labels, and the recipes of all feature files. The folder appears when it is
complete, so an existing one is done, and another recipe goes beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, listed, provenance, read_json, write_json
from pathme_jax.mil.bags import load
from pathme_jax.mil.settings import Settings
from pathme_jax.records.features import identity_of
from pathme_jax.records.labels import Labels, read_labels
from pathme_jax.records.survival import Survival, read_survival

VERSION = 2  # raise it when results change


def run(
    features: Path,
    labels: Path,
    task: str,
    out: Path,
    *,
    parent: Path | None = None,
    colour: Path | None = None,
    name: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Cross-validates a head and its controls, or returns what an equal run left.

    Args:
        features: folder of feature files.
        labels: label table, see `records.labels`.
        task: its column; for survival the endpoint (os, dss, …), or "" where there is one only.
        out: where `<task>/<name>-<hash8>/` goes.
        parent: features at 4 × the µm/px, joined to each instance.
        colour: CSV `slide_id,r,g,b` for the mean-colour row.
        name: of the bags; by default that of the feature folder.
        settings: fields of `mil.settings.Settings`.

    Returns:
        The content of metrics.json, and `folder`: where it is.

    Raises:
        UserError: see `read_labels`, `bags.load`, `folds`.
    """
    start = time.monotonic()
    chosen = Settings(**settings)
    if chosen.bag not in ("slide", "case"):
        raise UserError(f"bag is {chosen.bag!r}", "Expected slide or case")
    features, labels = Path(features), Path(labels)
    parent = Path(parent) if parent else None
    table = _table(labels, task, chosen)
    recipe = _recipe(features, parent, colour, table, chosen)
    folder = Path(out) / (task or "survival") / f"{name or features.name}-{digest(recipe)}"
    if not (folder / "metrics.json").exists():
        from pathme_jax.mil import crossval, survival  # import JAX, which a rerun need not

        for note in table.notes:
            print(f"{labels}: {note}")
        cohort = load(features, table, parent)
        with atomic(folder) as temporary:
            (temporary / "attention").mkdir(parents=True)
            if isinstance(table, Survival):
                metrics = survival.evaluate(temporary, cohort, table, chosen, folder.name)
            else:
                metrics = crossval.evaluate(temporary, cohort, table, chosen, colour, folder.name)
            metrics |= {"name": name or features.name, "no_label": _no_label(features, table)}
            write_json(temporary / "metrics.json", metrics)
            write_json(
                temporary / "run.json",
                {"recipe": recipe, "seconds": time.monotonic() - start, **provenance()},
            )
    return {**read_json(folder / "metrics.json"), "folder": str(folder)}


def _table(labels: Path, task: str, settings: Settings) -> Labels | Survival:
    if not settings.survival:
        return read_labels(labels, task, settings.fold_column_prefix)
    return read_survival(labels, task, fold_prefix=settings.fold_column_prefix)


def _truth(table: Labels | Survival) -> list[Any]:
    if isinstance(table, Survival):
        return [np.asarray(table.time).tolist(), np.asarray(table.event).tolist()]
    return [table.labels.tolist(), table.classes]


def _recipe(
    features: Path,
    parent: Path | None,
    colour: Path | None,
    table: Labels | Survival,
    settings: Settings,
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "settings": dataclasses.asdict(settings),
        "labels": [
            table.task,
            *zip(table.slide_ids, table.case_ids, strict=True),
            *_truth(table),
            table.folds,
        ],
        "features": [identity_of(features / f"{s}.h5") for s in table.slide_ids],
        "parents": [identity_of(parent / f"{s}.h5") for s in table.slide_ids] if parent else None,
        "colour": hashlib.sha256(Path(colour).read_bytes()).hexdigest() if colour else None,
    }


def _no_label(features: Path, table: Labels | Survival) -> list[str]:
    return sorted({path.stem for path in listed(features, ".h5")} - set(table.slide_ids))
