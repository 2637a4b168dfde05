"""Frozen features judged without a MIL head: linear probe, kNN, few-shot, retrieval, out of fold.

    <out>/<task>/<protocol>-<level>-<hash8>/metrics.json  table.csv  predictions.csv

A row is a slide (the mean of its tiles) or a tile (with its slide's label); folds and intervals are over cases. The hash
names the recipe, so an existing folder is done, and other settings go beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from pathme_jax.errors import UserError
from pathme_jax.evaluation import fewshot, metrics
from pathme_jax.evaluation.auroc import permutation_p
from pathme_jax.evaluation.classification import OutOfFold
from pathme_jax.evaluation.compare import compare_auroc
from pathme_jax.evaluation.intervals import bootstrap_weights, interval
from pathme_jax.evaluation.linear_probe import fit_predict
from pathme_jax.evaluation.probes import knn
from pathme_jax.evaluation.protocols import PROTOCOLS, Neighbours, Protocol
from pathme_jax.evaluation.retrieval import macro, retrieve
from pathme_jax.files import atomic, digest, provenance, read_json, write_csv, write_json
from pathme_jax.mil import folds as splits
from pathme_jax.mil.outputs import rounded
from pathme_jax.records.features import identity_of, read_features
from pathme_jax.records.labels import Labels, read_labels

VERSION = 1  # raise it when results change
SHOWN = ("auroc", "balanced_accuracy", "f1_macro", "recall@1", "recall@5", "map")
Part = tuple[np.ndarray, np.ndarray]  # (n, d) features and (n,) labels
COLUMNS = ["features", "probe", "metric", "value", "low", "high"]


@dataclasses.dataclass(frozen=True)
class Settings:
    protocol: str = "uni"
    level: str = "slide"
    folds: int = 5
    fold_column_prefix: str = "fold_"
    tiles_per_slide: int = 100
    draws: int = 1000
    seed: int = 0


@dataclasses.dataclass
class Rows:
    """n feature vectors.

    Attributes:
        x: (n, d) float32; labels: (n,) int; cases, slides: (n,) text; row: (n,) of the slide in the label table.
        problems: rows `slide_id, reason, cure` of slides left out.
    """

    x: np.ndarray
    labels: np.ndarray
    cases: np.ndarray
    slides: np.ndarray
    row: np.ndarray
    problems: list[dict[str, str]]


def run(
    features: list[Path], labels: Path, task: str, out: Path, **settings: Any
) -> dict[str, Any]:
    """Judges one or more feature folders on the same slides and folds, the first being the others' yardstick.

    Args:
        features: folders of feature files, one a slide (or of slide vectors: files of one row).
        labels, task: table and column, see `records.labels`.
        out: where `<task>/<protocol>-<level>-<hash8>/` goes.
        settings: fields of `Settings`.

    Returns:
        The content of metrics.json, and `folder`: where it is.

    Raises:
        UserError: see `read_labels`, `mil.folds`, `read_rows`; an unknown protocol or level.
    """
    chosen = Settings(**settings)
    if chosen.protocol not in PROTOCOLS:
        raise UserError(
            f"no protocol {chosen.protocol!r}", f"Expected one of {', '.join(PROTOCOLS)}"
        )
    if chosen.level not in ("slide", "tile"):
        raise UserError(f"level is {chosen.level!r}", "Expected slide or tile")
    names = _names(features)
    table = read_labels(labels, task, chosen.fold_column_prefix)
    recipe = {
        "version": VERSION,
        "settings": dataclasses.asdict(chosen),
        "labels": [*zip(table.slide_ids, table.case_ids, table.labels.tolist(), strict=True)],
        "classes": table.classes,
        "folds": table.folds,
        "features": {
            name: [identity_of(folder / f"{slide}.h5") for slide in table.slide_ids]
            for name, folder in zip(names, features, strict=True)
        },
    }
    folder = Path(out) / task / f"{chosen.protocol}-{chosen.level}-{digest(recipe)}"
    if not (folder / "metrics.json").exists():
        for note in table.notes:
            print(f"{labels}: {note}")
        with atomic(folder) as temporary:
            temporary.mkdir(parents=True)
            content = _evaluate(temporary, dict(zip(names, features, strict=True)), table, chosen)
            write_json(temporary / "metrics.json", rounded(content))
            write_json(temporary / "run.json", {"recipe": recipe, **provenance()})
    return {**read_json(folder / "metrics.json"), "folder": str(folder)}


def _names(features: list[Path]) -> list[str]:
    """Folder names, with their parents' where two are alike."""
    short = [folder.name for folder in features]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in features]
    if len(set(names)) < len(names):
        raise UserError("one feature folder is given twice", "Give different folders to compare")
    return names


def _evaluate(
    folder: Path, features: dict[str, Path], table: Labels, settings: Settings
) -> dict[str, Any]:
    protocol = PROTOCOLS[settings.protocol]
    sets = {name: read_rows(path, table, settings) for name, path in features.items()}
    if len(sets) > 1:
        sets = _common(sets)
    first = next(iter(sets.values()))
    slides, at = np.unique(first.slides, return_index=True)
    parts, skipped = _parts(first, at, table, settings)
    out_of_fold: dict[str, dict[str, OutOfFold]] = {}
    content: dict[str, Any] = {}
    for name, rows in sets.items():
        # Folds are of slides; a slide's tiles go with it.
        of_rows = parts[:, np.searchsorted(slides, rows.slides)]
        content[name], out_of_fold[name] = judge(
            rows, of_rows, len(table.classes), protocol, settings
        )
    names = list(sets)
    comparison = {
        f"{other} - {names[0]}": {
            probe: compare_auroc(
                out_of_fold[names[0]][probe], found, draws=settings.draws, seed=settings.seed
            )
            for probe, found in out_of_fold[other].items()
        }
        for other in names[1:]
        if settings.level == "slide"
    }
    _write_tables(folder, content, out_of_fold, sets, table.classes, settings)
    return {
        "task": table.task,
        "classes": table.classes,
        "protocol": settings.protocol,
        "settings": dataclasses.asdict(protocol),
        "level": settings.level,
        "cases": len(np.unique(first.cases)),
        "slides": len(slides),
        "rows": len(first.labels),
        "chance_accuracy": float(np.bincount(first.labels).max() / len(first.labels)),
        "folds": len(parts),
        "fold_source": ", ".join(table.folds) or "stratified by case",
        "folds_left_out": skipped,
        "features": content,
        "notes": [note for name in sets for note in _degenerate(name, out_of_fold[name]["linear"])],
        "comparison": comparison,
        "problems": {name: rows.problems for name, rows in sets.items()},
        "blank_label": table.unlabelled,
    }


def read_rows(folder: Path, table: Labels, settings: Settings) -> Rows:
    """The labelled slides of a folder, each its mean, or a random sample of its tiles; read one at a time.

    Raises:
        UserError: no slide can be used, or features of different widths.
    """
    parts: list[np.ndarray] = []
    used: list[int] = []
    problems: list[dict[str, str]] = []
    for row, slide in enumerate(table.slide_ids):
        try:
            parts.append(_read(folder / f"{slide}.h5", settings, row))
            used.append(row)
        except UserError as error:
            problems.append({"slide_id": slide, "reason": error.problem, "cure": error.cure})
    if not used:
        raise UserError(
            f"{folder}: none of the {len(table.slide_ids)} labelled slides can be used; {problems[0]['reason']}",
            "Check that slide_id in the labels and the names of the feature files agree",
        )
    widths = {part.shape[1]: table.slide_ids[row] for part, row in zip(parts, used, strict=True)}
    if len(widths) > 1:
        told = ", ".join(f"{width} ({slide})" for width, slide in widths.items())
        raise UserError(
            f"{folder}: features of several widths: {told}", "Extract all with one encoder"
        )
    row = np.repeat(used, [len(part) for part in parts])
    slides, cases = np.array(table.slide_ids), np.array(table.case_ids)
    return Rows(np.concatenate(parts), table.labels[row], cases[row], slides[row], row, problems)


def _read(path: Path, settings: Settings, row: int) -> np.ndarray:
    if not path.exists():
        raise UserError(f"no features in {path.parent.name}", "See the errors of extraction")
    x = read_features(path).features
    if not len(x):
        raise UserError("no instances", "The slide has no usable tissue: nothing to do")
    if settings.level == "slide":
        return x.mean(0, keepdims=True, dtype=np.float64).astype(np.float32)
    count = min(settings.tiles_per_slide, len(x))
    rng = np.random.default_rng([settings.seed, 10, row])
    return x[np.sort(rng.choice(len(x), count, replace=False))]


def _common(sets: dict[str, Rows]) -> dict[str, Rows]:
    """Each without the slides that another lacks, which become its problems."""
    common = set.intersection(*(set(rows.slides.tolist()) for rows in sets.values()))
    if not common:
        raise UserError(
            "no slide has features in every folder", "Compare encoders on the same slides"
        )
    found = {}
    for name, rows in sets.items():
        keep = np.isin(rows.slides, sorted(common))
        lost = sorted(set(rows.slides[~keep].tolist()))
        cure = "Extract it there too, or evaluate this folder by itself"
        problems = [{"slide_id": s, "reason": "not in all folders", "cure": cure} for s in lost]
        found[name] = dataclasses.replace(
            rows,
            **{
                field: getattr(rows, field)[keep]
                for field in ("x", "labels", "cases", "slides", "row")
            },
            problems=rows.problems + problems,
        )
    return found


def _parts(
    rows: Rows, at: np.ndarray, table: Labels, settings: Settings
) -> tuple[np.ndarray, list[str]]:
    """(f, s) parts of the slides, whose first rows are `at`."""
    if table.folds:

        def lacks(train: np.ndarray) -> str:
            return "" if len(np.unique(rows.labels[at][train])) > 1 else "fewer than two classes"

        parts, skipped = splits.given(table, rows.row[at].tolist(), lacks)
        return np.array(list(parts.values())), skipped
    cases = rows.cases[at].tolist()
    return splits.stratified(
        cases, rows.labels[at], table.classes, settings.folds, settings.seed
    ), []


def judge(
    rows: Rows, parts: np.ndarray, classes: int, protocol: Protocol, settings: Settings
) -> tuple[dict[str, Any], dict[str, OutOfFold]]:
    """All that a protocol measures of one feature set, and its classifiers' scores (run means).

    Args:
        parts: (f, n) of the rows, see `mil.folds`.

    Returns:
        probe to metric to value and 95 % interval over cases (few-shot: standard deviation over episodes beside);
        probe to scores.
    """
    scores: dict[str, list[np.ndarray]] = {}  # probe: per fold (r, m, c)
    looked_up: list[dict[str, np.ndarray]] = []
    shots: dict[str, list[np.ndarray]] = {}
    tested = [np.flatnonzero(part == splits.TEST) for part in parts]
    for part in parts:
        trained = np.isin(part, [splits.TRAIN] + [splits.VALIDATION] * protocol.with_validation)
        train = rows.x[trained], rows.labels[trained]
        chosen_on = (part == splits.VALIDATION) & ~trained
        valid = rows.x[chosen_on], rows.labels[chosen_on]
        test = rows.x[part == splits.TEST], rows.labels[part == splits.TEST]
        for probe, score in _fold_scores(
            train, valid, test[0], classes, protocol, settings
        ).items():
            scores.setdefault(probe, []).append(score)
        if protocol.retrieval:
            looked_up.append(retrieve(*train, *test, classes, protocol.retrieval))
        for name, found in _fold_episodes(train, test, protocol, settings).items():
            shots.setdefault(name, []).append(found)

    of = np.concatenate(tested)
    fold = np.repeat(np.arange(len(tested)), [len(test) for test in tested])
    labels, cases = rows.labels[of], rows.cases[of]
    weights = bootstrap_weights(cases, labels, settings.draws, settings.seed)
    result: dict[str, Any] = {}
    found_scores: dict[str, OutOfFold] = {}
    for probe, each in scores.items():
        whole = np.concatenate(each, axis=1)
        found = OutOfFold(whole.mean(0), labels, fold, cases)
        found_scores[probe] = found
        result[probe] = metrics.with_intervals(_mean_of_runs(whole, found, probe), weights)
        result[probe]["auroc"]["permutation_p"] = permutation_p(
            found.scores, labels, fold, cases, draws=min(settings.draws, 1000), seed=settings.seed
        )
    if looked_up:
        values = {k: np.concatenate([one[k] for one in looked_up]) for k in looked_up[0]}
        result["retrieval"] = metrics.with_intervals(
            lambda w: {name: macro(value, labels, w) for name, value in values.items()}, weights
        )
    for name, each in shots.items():
        over = np.concatenate(each)
        result[name] = {
            "balanced_accuracy": {
                "value": over.mean(),
                "interval": interval(over),  # of episodes: how much a support's choice matters
                "std": over.std(),
            }
        }
    return result, found_scores


def _mean_of_runs(
    scores: np.ndarray, found: OutOfFold, probe: str
) -> Callable[[np.ndarray | None], dict[str, np.ndarray]]:
    """(r, n, c) scores of runs to a measure: each run's, averaged."""

    def measure(weights: np.ndarray | None) -> dict[str, np.ndarray]:
        probabilities = probe != "prototypes"
        each = [
            metrics.classification(
                run, found.labels, found.folds, weights, probabilities=probabilities
            )
            for run in scores
        ]
        return {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}

    return measure


def _fold_scores(
    train: Part,
    valid: Part,
    test_x: np.ndarray,
    classes: int,
    protocol: Protocol,
    settings: Settings,
) -> dict[str, np.ndarray]:
    """Probe to (r, m, c) scores in one fold."""
    found = {"linear": fit_predict(protocol.linear, train, valid, test_x, classes, settings.seed)}
    if protocol.neighbours:
        for k in protocol.neighbours.k:
            found[f"knn{k}"] = _vote(protocol.neighbours, k, train, test_x, classes)[None]
    if protocol.fewshot:
        found["prototypes"] = fewshot.prototypes(*train, test_x, classes)[None]
    return found


def _vote(
    settings: Neighbours,
    k: int,
    train: Part,
    test_x: np.ndarray,
    classes: int,
) -> np.ndarray:
    """(m, c) shares of the votes of the k nearest training rows."""
    x, y = train
    votes = np.zeros((len(test_x), classes))
    if settings.vote == "softmax":
        found = knn(x, y, test_x, k)
        votes[:, : found.shape[1]] = found
        return votes
    mean = x.mean(0)
    source, query = (
        z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
        for z in (x - mean, test_x - mean)
    )
    model = KNeighborsClassifier(min(k, len(y))).fit(source, y)
    votes[:, model.classes_] = model.predict_proba(query)
    return votes


def _fold_episodes(
    train: Part, test: Part, protocol: Protocol, settings: Settings
) -> dict[str, np.ndarray]:
    """Name to (e,) balanced accuracies; shots that some class has too few rows for are left out."""
    if not protocol.fewshot:
        return {}
    fewest = np.bincount(train[1])[np.unique(train[1])].min()
    return {
        f"{shots}-shot": fewshot.episodes(
            *train,
            *test,
            shots,
            ways=protocol.fewshot.ways,
            number=protocol.fewshot.episodes,
            seed=settings.seed,
        )
        for shots in protocol.fewshot.shots
        if shots <= fewest
    }


def _degenerate(name: str, found: OutOfFold) -> list[str]:
    """UNI's penalty, a norm not squared, leaves no weight at all where features say less than 1 / (2 C)."""
    spans = [np.ptp(found.scores[found.folds == f], axis=0).max() for f in np.unique(found.folds)]
    flat = sum(span < 1e-6 for span in spans)
    if not flat:
        return []
    return [
        f"{name}: the linear probe of {flat} of {len(spans)} folds says the same of every row: its penalty outweighs "
        "features so narrow or so small. Scale them, or take the patho-bench protocol, which squares the norm"
    ]


def _write_tables(
    folder: Path,
    content: dict[str, Any],
    scores: dict[str, dict[str, OutOfFold]],
    sets: dict[str, Rows],
    classes: list[str],
    settings: Settings,
) -> None:
    write_csv(folder / "table.csv", table_rows(content), COLUMNS)
    if settings.level != "slide":
        return
    rows = [
        {"features": name, "probe": probe, "case_id": case, "fold": fold, "label": classes[label]}
        | {f"score_{c}": rounded(s) for c, s in zip(classes, score, strict=True)}
        for name, probes in scores.items()
        for probe, found in probes.items()
        for case, fold, label, score in zip(
            found.cases, found.folds, found.labels, found.scores, strict=True
        )
    ]
    columns = ["features", "probe", "case_id", "fold", "label", *(f"score_{c}" for c in classes)]
    write_csv(folder / "predictions.csv", rows, columns)


def table_rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for every feature set, probe and metric."""
    return [
        {"features": name, "probe": probe, "metric": metric}
        | dict(zip(COLUMNS[3:], rounded([value["value"], *value["interval"]]), strict=True))
        for name, probes in content.items()
        for probe, values in probes.items()
        for metric, value in values.items()
    ]
