"""New slides through a bundle: tiled, encoded, predicted, with a heatmap of where the heads looked.

<out>/<slide>/prediction.json   scores, what is said or why nothing is, and under which bundle
<out>/<slide>/attention.h5      as in a MIL run; of several tasks attention-<task>.h5 each, so below
<out>/<slide>/attention.geojson for QuPath
<out>/<slide>/heatmap.jpg       of the tiles by rank of their attention
<out>/_tiles/                   what pathme_jax.extract writes: tissue, coordinates, features
<out>/errors.csv                slides without a prediction, with reason and cure
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pathme_jax.data.stores import Failure, SlideStore, failure
from pathme_jax.encoders import encoder, extraction
from pathme_jax.errors import UserError
from pathme_jax.files import atomic, provenance, read_csv, read_json, write_csv, write_json
from pathme_jax.mil import abstention, bags
from pathme_jax.mil.bundle import RESEARCH, Bundle, load
from pathme_jax.mil.outputs import rounded
from pathme_jax.mil.saved import Answer
from pathme_jax.mil.tasks import Task
from pathme_jax.records.features import Bag, read_features
from pathme_jax.reports import figures, qupath
from pathme_jax.slides.listing import fingerprint
from pathme_jax.slides.reader import open_slide
from pathme_jax.slides.tile import raise_if_full

TILES = "_tiles"
SIDE = 1120  # px of a heatmap's thumbnail, at most
ERROR_COLUMNS = ["slide_id", "reason", "cure"]
# Cures that belong to other launchers' flags, by how the reason begins.
CURES = {
    "the file does not state its µm/px": "Give its µm per level-0 pixel with --mpp",
    "no tissue found": f"Draw it in {TILES}/contours_geojson with QuPath, and run again",
    "no tile within": f"Correct its outline in {TILES}/contours_geojson with QuPath, and run again",
    "too coarse": "The bundle's encoder needs finer slides: scan it again",
    "smaller than a field": "The bundle cannot be used on slides that small",
}


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What came of a run.

    Attributes:
        slides: slide_id to prediction.json, in the order given.
        errors: of the others. done: how many were predicted now.
    """

    out: Path
    slides: dict[str, dict[str, Any]]
    errors: list[Failure]
    done: int

    def __str__(self) -> str:
        lines = [f"{slide_id}: {about['says']}" for slide_id, about in self.slides.items()]
        skipped = len(self.slides) - self.done
        counts = f"{self.done} slides predicted, {skipped} were done, {len(self.errors)} failed"
        told = [item for about in self.slides.values() for item in about["tasks"].items()]
        if few := sorted({name for name, task in told if task["too_few_to_judge"]}):
            lines.append(f"{', '.join(few)}: learned from too few cases to judge")
        lines += [f"{counts}: {self.out}", RESEARCH]
        lines += [f"  {e['slide_id']}: {e['reason']}. {e['cure']}" for e in self.errors]
        return "\n".join(lines)


def predict(
    slides: Sequence[str | Path],
    folder: str | Path,
    out: str | Path,
    *,
    mpp: float | None = None,
    threshold: float | None = None,
    progress: bool = True,
    **settings: Any,
) -> Predicted:
    """Predicts every slide that is not done under this bundle; bad slides are listed and stop no other.

    Args:
        slides: whole-slide files. folder: the bundle. out: where everything goes.
        mpp: µm per level-0 pixel of the slides that do not state it.
        threshold: confidence below which classes and labels are withheld, instead of the bundle's.
        settings: precision, batch and workers of `extraction.choose`.

    Raises:
        UserError: wrong arguments, a bad bundle, or no slide at all could be predicted.
        OSError: the disk is full.
    """
    out = Path(out)
    files = _files(slides, out)
    for name, value, low, high in (("mpp", mpp, 0.05, 20), ("threshold", threshold, 0, 1)):
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {value:g}: expected {low:g} to {high:g}", "Correct it")
    bundle = load(folder)
    recipes = {s: _recipe(path, bundle, mpp, threshold) for s, path in files.items()}
    found = {s: _finished(out / s, recipes[s]) for s in files}
    pending = {s: path for s, path in files.items() if found[s] is None}
    errors: list[Failure] = []
    if pending:
        made, errors = _extract(pending, recipes, bundle, out / TILES, progress, settings)
        bad = {error["slide_id"] for error in errors}
        for slide_id, path in pending.items():
            if slide_id in bad:
                continue
            try:
                paths = [where / f"{slide_id}.h5" for where in made]
                found[slide_id] = _predict(path, paths, bundle, out, recipes[slide_id])
            except Exception as error:
                raise_if_full(error)
                errors.append(failure(slide_id, error))
    write_csv(out / "errors.csv", errors, ERROR_COLUMNS)
    good = {s: about for s, about in found.items() if about is not None}
    if not good:
        first = errors[0]
        raise UserError(
            f"none of the {len(errors)} slides could be predicted; {first['slide_id']}: {first['reason']}",
            f"{first['cure']}. All reasons and cures: {out / 'errors.csv'}",
        )
    return Predicted(out, good, errors, sum(s in pending for s in good))


def _files(slides: Sequence[str | Path], out: Path) -> dict[str, Path]:
    """Slide id to its file.

    Raises:
        UserError: two would share an id, or a slide's folder would replace what is no prediction, such as the data
            of a .mrxs slide beside it.
    """
    files: dict[str, Path] = {}
    for path in map(Path, slides):
        if path.stem in files or path.stem == TILES:
            other = files.get(path.stem, f"the folder {TILES}")
            raise UserError(f"{path} and {other} would both be {path.stem}", "Rename one")
        folder = out / path.stem
        if folder.exists() and not (folder / "prediction.json").exists():
            raise UserError(f"{folder} is there and is no prediction", "Give another --out")
        files[path.stem] = path
    return files


def _recipe(
    path: Path, bundle: Bundle, mpp: float | None, threshold: float | None
) -> dict[str, Any]:
    """What decides a slide's prediction."""
    recipe = {"bundle": bundle.about["hash"], "threshold": threshold, "mpp": None, "slide": None}
    with contextlib.suppress(OSError):  # extraction tells of it
        recipe["slide"] = fingerprint(path)
        if mpp is not None and not _states_mpp(path):
            recipe["mpp"] = mpp
    return recipe


def _states_mpp(path: Path) -> bool:
    try:
        with open_slide(path, None):
            return True
    except UserError:
        return False


def _finished(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """A slide's prediction.json, where it was made under this recipe."""
    try:
        about = read_json(folder / "prediction.json")
        return about if about["recipe"] == recipe else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- features --------------------------------------------------------------------------------------


def _extract(
    files: Mapping[str, Path],
    recipes: Mapping[str, Mapping[str, Any]],
    bundle: Bundle,
    out: Path,
    progress: bool,
    settings: Mapping[str, Any],
) -> tuple[list[Path], list[Failure]]:
    """Folders of the features, and of the parents' where there are any; the slides that failed."""
    dtype, mpps = bundle.heads.features["dtype"], bundle.mpps
    precision = extraction.choose(dtype=dtype, **settings).precision
    model = encoder.load(bundle.encoder, precision)
    if model.name != bundle.about["encoder"]["name"]:
        raise UserError(
            f"{bundle.encoder} is {model.name}, bundle.json says {bundle.about['encoder']['name']}",
            "Make the bundle again with pathme_jax.bundle",
        )
    rows = [
        {"path": path.resolve(), "mpp": recipes[slide_id]["mpp"] or ""}
        for slide_id, path in files.items()
    ]
    write_csv(out / "slides.csv", rows, ["path", "mpp"])
    store = SlideStore(out / "slides.csv", out, **dataclasses.asdict(bundle.recipe))
    table = store.grid_dir / "extraction_errors.csv"
    table.unlink(missing_ok=True)
    try:
        made = extraction.extract(
            store, [model], mpps=mpps, dtype=dtype, progress=progress, **settings
        )
        folders, errors = [made.folders[model.name, mpp] for mpp in mpps], made.errors
    except UserError:
        if not table.exists():
            raise
        folders, errors = [], read_csv(table)  # all failed, each for a reason of its own
    return folders, [_with_cure(error) for error in errors]


def _with_cure(error: Mapping[str, str]) -> Failure:
    cures = [cure for start, cure in CURES.items() if error["reason"].startswith(start)]
    return {key: error[key] for key in ERROR_COLUMNS} | ({"cure": cures[0]} if cures else {})


# ---- one slide -------------------------------------------------------------------------------------


def _predict(
    path: Path, files: Sequence[Path], bundle: Bundle, out: Path, recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes a slide's folder; its prediction.json."""
    slide, *parents = map(read_features, files)
    for parent in parents:
        slide = bags.with_parents(slide, parent)
    if not len(slide.features) or slide.grid is None:
        raise UserError("no tile with a parent", "The slide has too little tissue for this bundle")
    answer = bundle.heads.answer(slide.features, slide.grid)
    tasks = bundle.heads.tasks.each
    told = {task.name: tell(bundle, task, answer, recipe["threshold"]) for task in tasks}
    says = {name: said(about) for name, about in told.items()}
    about = {
        "slide_id": slide.slide_id,
        "path": str(path),
        "use": RESEARCH,
        "says": "; ".join(f"{name}: {text}" for name, text in says.items())
        if len(says) > 1
        else "".join(says.values()),
        "tasks": rounded(told),
        "tiles": len(slide.features),
        "mpp": slide.attrs["mpp"],
        "level0_mpp": slide.attrs["level0_mpp"],
        "bundle": {key: bundle.about[key] for key in ("name", "hash", "head", "members", "bag")},
        "encoder": bundle.about["encoder"]["name"],
        "recipe": recipe,
        "provenance": provenance(),
    }
    thumbnail = figures.read_picture(out / TILES / "thumbnails" / f"{slide.slide_id}.jpg", SIDE)
    with atomic(out / slide.slide_id) as temporary:
        temporary.mkdir(parents=True)
        for task in tasks:
            end = f"-{task.name}" if len(tasks) > 1 else ""
            attention = bundle.heads.attention(answer, task.name)
            _write_attention(temporary, end, slide, attention, thumbnail)
        write_json(temporary / "prediction.json", about)
    return about


def _write_attention(
    folder: Path, end: str, slide: Bag, attention: np.ndarray, thumbnail: np.ndarray | None
) -> None:
    with h5py.File(folder / f"attention{end}.h5", "w") as file:
        file.create_dataset("attention", data=attention.astype(np.float32))
        file.create_dataset("coords", data=slide.coords).attrs.update(slide.attrs)
        file.create_dataset("kind", data=slide.kind)
        file.create_dataset("grid", data=slide.grid)
    side = slide.attrs["patch_size_level0"]
    qupath.write(folder / f"attention{end}.geojson", slide.coords, attention, side)
    if thumbnail is not None:
        size = slide.attrs["level0_width"], slide.attrs["level0_height"]
        picture = figures.attention_overlay(thumbnail, slide.coords, attention, side, size)
        (folder / f"heatmap{end}.jpg").write_bytes(picture)


# ---- what is said ----------------------------------------------------------------------------------


def tell(bundle: Bundle, task: Task, answer: Answer, threshold: float | None) -> dict[str, Any]:
    """Scores of a task with their spread over the members, and what is said: see `said`.

    threshold: instead of the bundle's, of classes and labels; None keeps that.
    """
    scores = bundle.heads.scores(answer, task.name)
    mean, spread = scores.mean(0).tolist(), scores.std(0).tolist()
    about = bundle.about["tasks"][task.name]
    rule, told = about["rule"], {"kind": task.kind, "too_few_to_judge": about["too_few_to_judge"]}
    if task.kind == "classes":
        best = int(np.argmax(mean))
        least = rule["threshold"] if threshold is None else threshold
        return told | {
            "scores": dict(zip(task.names, mean, strict=True)),
            "spread": dict(zip(task.names, spread, strict=True)),
            "best": task.names[best],
            **_withheld(mean[best], least),
        }
    if task.kind == "labels":
        each = {}
        for name, score, width in zip(task.names, mean, spread, strict=True):
            least = rule[name]["threshold"] if threshold is None else threshold
            judged = _withheld(max(score, 1 - score), least)
            each[name] = {"score": score, "spread": width, "present": score >= 0.5, **judged}
        return told | {"labels": each}
    if task.kind == "number":
        radius = rule["interval"]
        interval = None if radius is None else [mean[0] - radius, mean[0] + radius]
        told |= {"interval": interval, "level": rule["level"]}
        return told | {"prediction": mean[0], "spread": spread[0]}
    by_fold = scores[:, 0].reshape(bundle.heads.folds, bundle.heads.seeds).mean(1)
    seen: dict[int, list[float]] = {}
    for row in bundle.rows[task.name]:
        seen.setdefault(int(row["fold"]), []).append(float(row["risk"]))
    place = abstention.percentile(by_fold, {fold: np.array(x) for fold, x in seen.items()})
    return told | {"risk": mean[0], "spread": spread[0], "percentile": place}


def _withheld(confidence: float, threshold: float | None) -> dict[str, Any]:
    """Without a threshold everything is."""
    abstains = threshold is None or confidence < threshold
    return {"confidence": confidence, "threshold": threshold, "abstains": abstains}


def said(told: Mapping[str, Any]) -> str:
    """A task's prediction in words."""
    if told["kind"] == "classes":
        best, confidence = told["best"], told["confidence"]
        if told["abstains"]:
            return f"abstains (best: {best} {confidence:.2f}{_why(told)})"
        others = {name: score for name, score in told["scores"].items() if name != best}
        ranked = sorted(others.items(), key=lambda item: -item[1])
        return f"{best} {confidence:.2f} ({', '.join(f'{n} {score:.2f}' for n, score in ranked)})"
    if told["kind"] == "labels":
        return ", ".join(_label(name, one) for name, one in told["labels"].items())
    if told["kind"] == "number":
        if told["interval"] is None:
            return f"{told['prediction']:.4g} (too few cases for an interval)"
        low, high = told["interval"]
        return f"{told['prediction']:.4g} ({told['level']:.0%} interval {low:.4g} to {high:.4g})"
    return f"risk higher than or equal to {told['percentile']:.0f} % of cases"


def _label(name: str, one: Mapping[str, Any]) -> str:
    word = "present" if one["present"] else "absent"
    if one["abstains"]:
        return f"{name} abstains (best: {word} {one['confidence']:.2f}{_why(one)})"
    return f"{name} {word} {one['confidence']:.2f}"


def _why(one: Mapping[str, Any]) -> str:
    least = one["threshold"]
    return (
        "; no threshold is known to be right often enough" if least is None else f" < {least:.2f}"
    )
