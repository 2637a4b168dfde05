"""A bundle: all that predicts one new slide, in one folder.

bundle.json            tasks with their rules of abstention, what it was trained on, tiling, licence, versions
heads/                 see `mil.saved`
encoder/               see `encoders.load`; not there for an encoder without weights
out_of_fold/<task>.csv truths and scores of the cases it was judged on, without their ids
"""

from __future__ import annotations

import collections
import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.encoders import card, encoder
from pathme_jax.encoders.encoder import FIXED
from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, provenance, read_csv, read_json, write_csv, write_json
from pathme_jax.mil import saved
from pathme_jax.mil.abstention import conformal_radius, least_confidence
from pathme_jax.mil.outputs import rounded
from pathme_jax.mil.tasks import Task
from pathme_jax.slides.plan import Recipe

VERSION = 1  # of the folder
ABOUT, HEADS, ENCODER, OUT_OF_FOLD = "bundle.json", "heads", "encoder", "out_of_fold"
LEVEL = 0.9  # of intervals of numbers
RESEARCH = "Research use only: not a medical device, not for diagnosis or treatment."
COPIED = ("measure", "cases", "cases_per_class", "slides", "events", "mean", "std")

Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle that was read.

    Attributes:
        about: bundle.json. encoder: what `encoders.load` takes.
        rows: task to the rows of its out-of-fold table.
    """

    folder: Path
    about: dict[str, Any]
    heads: saved.Saved
    encoder: str | Path
    rows: dict[str, list[Row]]

    @property
    def recipe(self) -> Recipe:
        """How slides are tiled."""
        return _recipe(self.about["features"])

    @property
    def mpps(self) -> list[float]:
        """µm/px of the features, and of their parents where there are any."""
        own = self.heads.features
        return [part["mpp"] for part in (own, own["parent"]) if part]


# ---- making one ------------------------------------------------------------------------------------


def make(run: str | Path, path: str | Path, out: str | Path, accuracy: float = 0.9) -> Bundle:
    """Puts a MIL run's heads and their encoder into one folder; complete or not at all.

    Args:
        run: a folder that `mil.run` wrote.
        path: the encoder, anything `encoders.load` takes, or what `pathme_jax.export` wrote.
        out: the bundle; an older one there is replaced.
        accuracy: share of cases in which predictions that are not withheld are to be right.

    Raises:
        UserError: not such a run; another encoder than that of the features; features a slide cannot be given alone
            (region tokens, foreign files, parents of another encoder).
    """
    run, out = Path(run), Path(out)
    if not 0 < accuracy <= 1:
        raise UserError(
            f"--accuracy {accuracy:g}: expected a share above 0, at most 1", "Correct it"
        )
    if out.exists() and not (out / ABOUT).exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} is there and is no bundle", "Give another --out")
    heads = saved.load(run / HEADS)
    _check_features(heads.features)
    source = _encoder_at(path)
    model = encoder.load(source)
    _same(str(path), model.name, heads.features["encoder"])
    rows = {task.name: _rows(run / task.name / "cases.csv", task) for task in heads.tasks.each}
    metrics = {name: _metrics(run / name / "metrics.json") for name in rows}
    tasks = {
        task.name: _told(task, metrics[task.name], rule_of(task, rows[task.name], accuracy))
        for task in heads.tasks.each
    }
    about = {
        "version": VERSION,
        "name": out.name,
        "use": RESEARCH,
        "head": heads.about["head"],
        "members": heads.folds * heads.seeds,
        "bag": next(iter(metrics.values())).get("bag", "slide"),
        "tasks": rounded(tasks),
        "features": heads.features,
        "encoder": _about_encoder(model),
        # Not where it was made, and by which command: bundles travel.
        **{key: provenance()[key] for key in ("versions", "commit")},
    }
    with atomic(out) as temporary:
        shutil.copytree(run / HEADS, temporary / HEADS)
        if model.params:
            _copy_encoder(Path(source), temporary / ENCODER)
            _same(str(path), encoder.load(temporary / ENCODER).name, model.name)
        for name, kept in rows.items():
            columns = [column for column in kept[0] if column != "case_id"]
            write_csv(temporary / OUT_OF_FOLD / f"{name}.csv", kept, columns)
        about["hash"] = _hash(about, heads, _read_rows(temporary, about))
        write_json(temporary / ABOUT, about)
    return load(out)


def _check_features(features: Mapping[str, Any]) -> None:
    """Raises UserError on features that `predict` could not make of a slide."""
    missing = [key for key in ("encoder", "mpp", "dtype") if not features.get(key)]
    if missing:
        raise UserError(
            f"the heads' features do not say their {', '.join(missing)} (foreign feature files)",
            "Extract with pathme_jax.extract and cross-validate again",
        )
    name = features["encoder"]
    if features["tokens"]:
        raise UserError(
            f"the heads' features are region tokens of {name}: a bundle tiles and encodes single tiles",
            "Cross-validate on tile features",
        )
    tiling = features["tiling"]
    if not tiling or tiling.get("source") == "images":
        what = (
            "were patches of images" if tiling else "lay apart from the recipe.json of their grid"
        )
        raise UserError(
            f"the heads' features {what}, so how slides are to be tiled is not known",
            "Extract slides with pathme_jax.extract, leave the features there, and cross-validate again",
        )
    _recipe(features)
    if parent := features["parent"]:
        _check_features(parent)
        for key in ("encoder", "tiling", "dtype"):
            if parent[key] != features[key]:
                raise UserError(
                    f"the parents' features have another {key} than the heads' own ({name})",
                    "Bundles join parents of one encoder and one extraction",
                )


def _recipe(features: Mapping[str, Any]) -> Recipe:
    """Raises UserError where this version would tile otherwise."""
    tiling = features["tiling"]
    known = {field.name: tiling.get(field.name) for field in dataclasses.fields(Recipe)}
    recipe = Recipe(**known)
    if digest(recipe.content()) != digest(tiling):
        raise UserError(
            "the heads' slides were tiled by another version of pathme_jax",
            "Extract and cross-validate again with this one",
        )
    return recipe


def _encoder_at(path: str | Path) -> str | Path:
    """What `encoders.load` takes, of an exported encoder's folder too."""
    if str(path) in FIXED:
        return str(path)
    flax = Path(path) / "flax"
    return flax if (Path(path) / "export.json").exists() and flax.is_dir() else Path(path)


def _same(path: str, name: str, expected: str) -> None:
    if name != expected:
        raise UserError(
            f"{path} is {name}, the heads were trained on features of {expected}",
            "Give --encoder the one that made the features",
        )


def _copy_encoder(source: Path, folder: Path) -> None:
    """A converted encoder's folder, or a finished run's product: without checkpoints, and without provenance, which
    holds paths and names of where it was made."""
    folder.mkdir(parents=True)
    if (source / encoder.ABOUT).exists():
        shutil.copy(source / encoder.PARAMS, folder)
        _copy_about(source / encoder.ABOUT, folder)
        return
    shutil.copytree(source / "product", folder / "product")
    _copy_about(source / "product.json", folder)
    run = read_json(card.home(source) / "config.json")
    run["config"] = run["identity"]["config"]
    write_json(folder / "config.json", {k: v for k, v in run.items() if k != "provenance"})


def _copy_about(path: Path, folder: Path) -> None:
    about = {key: value for key, value in read_json(path).items() if key != "provenance"}
    write_json(folder / path.name, about)


def _about_encoder(model: encoder.Encoder) -> dict[str, Any]:
    definition = model.definition
    terms = {key: getattr(definition, key, "") for key in ("licence", "terms", "source")}
    return {
        "name": model.name,
        **terms,
        "made_from": model.lineage,
        "warnings": card.warnings(model.lineage),
    }


def _rows(path: Path, task: Task) -> list[Row]:
    try:
        rows = read_csv(path)
    except OSError as error:
        raise UserError(
            f"{path}: no out-of-fold predictions ({error.strerror})",
            "Give --run a folder that pathme_jax.mil_train wrote",
        ) from error
    needed = {"case_id", "fold", *_columns(task)}
    if not rows or not needed <= set(rows[0]):
        missing = ", ".join(sorted(needed - set(rows[0] if rows else ())))
        raise UserError(f"{path}: no {missing or 'row'} in it", "Cross-validate again")
    return rows


def _columns(task: Task) -> list[str]:
    if task.kind == "classes":
        return ["label", *(f"score_{name}" for name in task.names)]
    if task.kind == "labels":
        return [f"{what}_{name}" for name in task.names for what in ("label", "score")]
    return ["truth", "prediction"] if task.kind == "number" else ["risk"]


def _metrics(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error})",
            "Give --run a folder that pathme_jax.mil_train wrote",
        ) from error


def _told(task: Task, metrics: Mapping[str, Any], rule: Mapping[str, Any]) -> dict[str, Any]:
    """What bundle.json says of a task."""
    head = metrics.get("rows", {}).get("head", {})
    measure = metrics.get("measure", "")
    kept = (measure, "interval", "permutation_p", "measures")
    return {
        "kind": task.kind,
        **{key: metrics[key] for key in COPIED if key in metrics},
        "too_few_to_judge": bool(metrics.get("too_few_to_judge")),
        "measures": {key: head[key] for key in kept if key in head},
        "rule": dict(rule),
    }


def rule_of(task: Task, rows: list[Row], accuracy: float) -> dict[str, Any]:
    """When to say nothing; of a number, its interval.

    Args:
        rows: of cases.csv; a case that several folds tested counts once, with its mean scores.
    """
    if task.kind == "classes":
        scores = _by_case(rows, [f"score_{name}" for name in task.names])
        label_of = {row["case_id"]: task.names.index(row["label"]) for row in rows}
        found = np.array(list(scores.values()))
        right = found.argmax(1) == [label_of[case] for case in scores]
        return least_confidence(found.max(1), right, accuracy)
    if task.kind == "labels":
        return {name: _rule_of_label(name, rows, accuracy) for name in task.names}
    if task.kind == "number":
        values = np.array(list(_by_case(rows, ["truth", "prediction"]).values()))
        radius = conformal_radius(values[:, 0] - values[:, 1], LEVEL)
        return {"interval": radius, "level": LEVEL, "cases": len(values)}
    return {"cases": len({row["case_id"] for row in rows})}


def _rule_of_label(name: str, rows: list[Row], accuracy: float) -> dict[str, Any]:
    known = [row for row in rows if row[f"label_{name}"] != ""]
    pairs = _by_case(known, [f"label_{name}", f"score_{name}"])
    truth, score = np.array(list(pairs.values())).reshape(-1, 2).T
    right = (score >= 0.5) == (truth >= 0.5)
    return least_confidence(np.maximum(score, 1 - score), right, accuracy)


def _by_case(rows: list[Row], columns: list[str]) -> dict[str, np.ndarray]:
    """Case to the mean of its rows."""
    found = collections.defaultdict(list)
    for row in rows:
        found[row["case_id"]].append([float(row[column]) for column in columns])
    return {case: np.mean(values, axis=0) for case, values in found.items()}


# ---- reading one -----------------------------------------------------------------------------------


def load(folder: str | Path) -> Bundle:
    """Raises UserError where it is missing, incomplete, changed, or of another version."""
    folder = Path(folder)
    cure = "Make it again with pathme_jax.bundle"
    try:
        about = read_json(folder / ABOUT)
        version = about["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / ABOUT}: not a bundle ({error})", cure) from error
    if version != VERSION:
        raise UserError(f"{folder / ABOUT}: version {version}, expected {VERSION}", cure)
    heads = saved.load(folder / HEADS)
    try:
        rows = _read_rows(folder, about)
        same = _hash(about, heads, rows) == about["hash"]
    except (OSError, KeyError) as error:
        raise UserError(f"{folder}: incomplete ({error})", cure) from error
    if not same:
        raise UserError(f"{folder}: its parts are not those {ABOUT} was written with", cure)
    name = about["encoder"]["name"]
    return Bundle(folder, about, heads, name if name in FIXED else folder / ENCODER, rows)


def _read_rows(folder: Path, about: Mapping[str, Any]) -> dict[str, list[Row]]:
    return {name: read_csv(folder / OUT_OF_FOLD / f"{name}.csv") for name in about["tasks"]}


def _hash(about: Mapping[str, Any], heads: saved.Saved, rows: Mapping[str, list[Row]]) -> str:
    """Of all that decides predictions; the encoder's name holds the hash of its weights."""
    decides = {key: about[key] for key in ("version", "tasks")}
    return digest([decides, about["encoder"]["name"], heads.about, rows])
