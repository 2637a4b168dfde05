"""One cross-validation: feature files and labels in, a folder of predictions, metrics, attention and heads out.

    <out>/<name>-<hash8>/run.json history.csv [sweep.csv] attention/<slide>.h5 heads/
                         <task>/metrics.json predictions.csv cases.csv

The hash names the recipe: settings, labels, and the recipes of all feature files. The folder appears when it is
complete, so an existing one is done, and another recipe goes beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from pathlib import Path
from typing import Any

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, listed, provenance, read_json, write_json
from pathme_jax.mil.bags import load
from pathme_jax.mil.settings import Settings
from pathme_jax.mil.table import Table, read
from pathme_jax.records.features import identity_of

VERSION = 4  # raise it when results change
PLACES = ("host_gb", "device_gb")  # where bags lie changes nothing


def run(
    features: Path,
    labels: Path,
    task: str,
    out: Path,
    *,
    parent: Path | None = None,
    colour: Path | None = None,
    classes: str = "",
    splits: Path | None = None,
    name: str | None = None,
    dry_run: bool = False,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """Cross-validates a head and its controls, or returns what an equal run left.

    Args:
        features: folder of feature files.
        labels: label table, see `records.labels`.
        task: one or several of its columns, with their kinds: see `mil.table.read`.
        out: where `<name>-<hash8>/` goes.
        parent: features at 4 × the µm/px, joined to each instance.
        colour: CSV `slide_id,r,g,b` for the mean-colour row.
        classes: of the task of classes, comma separated, in their order; by default those found.
        splits: split files in the place of fold columns, see `records.splits`.
        name: of the bags; by default that of the feature folder.
        dry_run: only print what would be done, and return nothing.
        settings: fields of `mil.settings.Settings`.

    Returns:
        Of each task the content of its metrics.json, and `folder`: where that is.

    Raises:
        UserError: see `mil.table.read`, `bags.load`, `folds`.
    """
    start = time.monotonic()
    chosen = Settings(**settings)
    if chosen.bag not in ("slide", "case"):
        raise UserError(f"bag is {chosen.bag!r}", "Expected slide or case")
    features, labels = Path(features), Path(labels)
    parent = Path(parent) if parent else None
    table = read(
        labels,
        task,
        classes=tuple(filter(None, classes.split(","))),
        fold_prefix=chosen.fold_column_prefix,
        bins=chosen.time_bins,
        splits=splits,
    )
    recipe = _recipe(features, parent, colour, table, chosen)
    folder = Path(out) / f"{name or features.name}-{digest(recipe)}"
    if dry_run or not (folder / "run.json").exists():
        from pathme_jax.mil import (
            crossval,
            saved,
        )  # Flax and scikit-learn, which a rerun need not import

        for note in table.notes:
            print(f"{labels}: {note}")
        cohort = load(features, table, parent, int(chosen.host_gb * 2**30) or _share())
        if dry_run:
            print(crossval.describe(cohort, table, chosen), folder, sep="\n")
            return {}
        more = {"name": name or features.name, "no_label": _no_label(features, table)}
        made_of = saved.features_of(features, [s.slide_id for s in cohort.slides], parent)
        with atomic(folder) as temporary:
            (temporary / "attention").mkdir(parents=True)
            crossval.evaluate(temporary, cohort, table, chosen, colour, more, made_of)
            write_json(
                temporary / "run.json",
                {"recipe": recipe, "seconds": time.monotonic() - start, **provenance()},
            )
    own = [folder / task.name for task in table.tasks.each]
    return {each.name: {**read_json(each / "metrics.json"), "folder": str(each)} for each in own}


def _share() -> int:
    """Bytes: two fifths of the machine's memory."""
    return int(0.4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _recipe(
    features: Path,
    parent: Path | None,
    colour: Path | None,
    table: Table,
    settings: Settings,
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in PLACES},
        "labels": [
            [dataclasses.asdict(task) for task in table.tasks.each],
            *zip(table.slide_ids, table.case_ids, strict=True),
            [truth.tolist() for truth in table.truth],
            table.folds,
        ],
        "features": [identity_of(features / f"{s}.h5") for s in table.slide_ids],
        "parents": [identity_of(parent / f"{s}.h5") for s in table.slide_ids] if parent else None,
        "colour": hashlib.sha256(Path(colour).read_bytes()).hexdigest() if colour else None,
    }


def _no_label(features: Path, table: Table) -> list[str]:
    return sorted({path.stem for path in listed(features, ".h5")} - set(table.slide_ids))
