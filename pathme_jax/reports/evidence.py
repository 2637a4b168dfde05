"""What is drawn, listed and looked at for each kind of task: one function a kind in `FIGURES` and `SLIDES`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sized
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from pathme_jax.evaluation import auroc, calibration, metrics
from pathme_jax.evaluation.survival import kaplan_meier, logrank
from pathme_jax.files import read_csv
from pathme_jax.reports import plots, results, words
from pathme_jax.reports.results import Result, Row, numbers

MOST_CURVES = 6  # of classes or labels in one picture: the hardest
MOST_PANELS = 12  # labels with a confusion matrix


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure with what it says.

    Attributes:
        name: of its files, without the task and the ending.
        figure: the picture. alt: its message, for who does not see it. caption: how it was made.
    """

    name: str
    figure: Figure
    alt: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Slide:
    """A row of the slide table.

    Attributes:
        slide_id, case_id, fold: which bag, by which model.
        cells: column → text.
        mark: "right", "wrong", or "" where there is no such thing.
        told: the row in words, above its picture.
        rank: what the table and the choice of pictures are sorted by, largest first.
    """

    slide_id: str
    case_id: str
    fold: str
    cells: dict[str, str]
    mark: str
    told: str
    rank: float


def figures(found: Mapping[str, Result]) -> list[Drawn]:
    """The figures of a task from each kind of bag's result; all but the ROC and C curves are of the last."""
    last = list(found.values())[-1]
    return FIGURES[last.kind](found) if last.cases else []


def slides(found: Result) -> list[Slide]:
    """Every bag tested: mistakes first, the surest on top; survival by fold and falling risk."""
    rows = SLIDES[found.kind](found) if found.slides else []
    return sorted(rows, key=lambda row: (row.mark == "right", -row.rank))


def chosen(rows: list[Slide]) -> list[list[Slide]]:
    """The two ends of the table, best candidates first: surest right and worst wrong, or highest and lowest."""
    if any(row.mark for row in rows):
        ends = [[row for row in rows if row.mark == mark] for mark in ("right", "wrong")]
        return [sorted(end, key=lambda row: -row.rank) for end in ends]
    order = sorted(rows, key=lambda row: -row.rank)
    half = (len(order) + 1) // 2
    return [order[:half], order[half:][::-1]]


# --- loss


def loss(run: Path) -> Drawn | None:
    """Training and validation loss from history.csv, None where there is none."""
    file = Path(run) / "history.csv"
    rows = read_csv(file) if file.exists() else []
    if not rows:
        return None
    parts = {}
    for name, column in (("training", "loss"), ("validation", "validation_loss")):
        values = _by_fold(rows, column)
        if np.isfinite(values).any():
            parts[name] = values
    if not parts:
        return None
    ends = "; ".join(
        f"{name} loss from {_edge(values, 0):.3g} to {_edge(values, -1):.3g}"
        for name, values in parts.items()
    )
    return Drawn(
        "loss",
        plots.losses(parts),
        f"Loss over {next(iter(parts.values())).shape[1]} epochs, mean of the folds: {ends}.",
        "A thin line a fold, their mean bold."
        + (
            " Validation loss that climbs while training loss falls is overfitting."
            if "validation" in parts
            else ""
        ),
    )


def _by_fold(rows: list[Row], column: str) -> np.ndarray:
    """(f, epochs), NaN where the file says nothing."""
    fold, epoch = (numbers(rows, name).astype(int) for name in ("fold", "epoch"))
    names, of = np.unique(fold, return_inverse=True)
    values = np.full((len(names), epoch.max() + 1), np.nan)
    values[of, epoch] = numbers(rows, column)
    return values


def _edge(values: np.ndarray, end: int) -> float:
    """Mean over the folds at the first or last epoch that any of them has."""
    known = values[:, np.isfinite(values).any(0)][:, end]
    return float(known[np.isfinite(known)].mean())


# --- classes


def _class_figures(found: Mapping[str, Result]) -> list[Drawn]:
    last = list(found.values())[-1]
    scores, labels, folds = _class_arrays(last)
    names = last.names
    positive = {names[c]: labels == c for c in _compared(names)}
    score = {names[c]: scores[:, c] for c in _compared(names)}
    single = _against(score, positive, dict.fromkeys(score, folds))
    drawn = [
        _roc(found, single if len(found) == 1 else {b: _mean_roc(r) for b, r in found.items()}),
        _precision_recall(score, positive),
    ]
    table = metrics.confusion(scores.argmax(1), labels, len(names))[0]
    share = np.diagonal(table) / np.maximum(table.sum(1), 1)
    told = ", ".join(f"{name} {100 * s:.0f} %" for name, s in zip(names, share, strict=True))
    each = _each_case(last)
    drawn.append(
        Drawn(
            "confusion",
            plots.confusion({"": table}, {"": names}),
            f"Confusion matrix. Found of each true class: {told}.",
            f"Counts; colour and per cent are shares of the true class. The most probable class is the prediction. {each}",
        )
    )
    points = calibration.reliability(scores, labels)
    ece = float(calibration.expected_calibration_error(scores, labels)[0])
    stated = scores[:, 1] if len(names) == 2 else scores.max(1)
    of = names[1] if len(names) == 2 else "the predicted class"
    drawn.append(
        Drawn(
            "calibration",
            plots.reliability({f"{of}, ECE {ece:.3f}": points}, {of: stated}),
            f"Reliability diagram of the probability of {of}: expected calibration error {ece:.3f}.",
            f"Probability of {of}, in tenths. Below the diagonal the model is too sure. {each}",
        )
    )
    own = {n: scores[labels == c, c] for c, n in enumerate(names)}
    medians = ", ".join(f"{n} {np.median(v):.2f}" for n, v in own.items() if len(v))
    drawn.append(
        Drawn(
            "scores",
            plots.strips(own, "probability of the true class"),
            f"Probability of the true class, median by class: {medians}.",
            f"A point a case, by its true class; the bar is the median. {each}",
        )
    )
    return drawn


def _class_arrays(found: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (n, c), labels (n,) and folds (n,) of the cases."""
    names = found.names
    scores = results.matrix(found.cases, "score_", names)
    return scores, results.class_of(found.cases, names), numbers(found.cases, "fold").astype(int)


def _compared(names: list[str]) -> range:
    """Of two classes the second alone: the other's curves are its mirror image."""
    return range(1, 2) if len(names) == 2 else range(len(names))


def _class_slides(found: Result) -> list[Slide]:
    names = found.names
    scores = results.matrix(found.slides, "score_", names)
    labels = results.class_of(found.slides, names)
    made = []
    for row, score, label in zip(found.slides, scores, labels, strict=True):
        said = int(score.argmax())
        mark = "right" if said == label else "wrong"
        cells = {"truth": names[label], "prediction": names[said]}
        cells["probability"] = f"{score[said]:.2f}"
        told = (
            f"{names[label]}: classified {'rightly' if mark == 'right' else 'wrongly'}, "
            f"score of its true class {score[label]:.2f}"
        )
        made.append(_slide(row, cells, mark, told, score[said]))
    return made


# --- labels


def _label_figures(found: Mapping[str, Result]) -> list[Drawn]:
    last = list(found.values())[-1]
    truth, score, folds = _label_arrays(last)
    known = {n: np.isfinite(truth[n]) for n in last.names}
    names = [n for n in last.names if known[n].any()]
    if not names:
        return []
    positive = {n: truth[n][known[n]] > 0 for n in names}
    stated = {n: score[n][known[n]] for n in names}
    single = _against(stated, positive, {n: folds[known[n]] for n in names})
    drawn = [
        _roc(found, single if len(found) == 1 else {b: _mean_roc(r) for b, r in found.items()}),
        _precision_recall(stated, positive),
    ]
    tables = {
        n: metrics.confusion((stated[n] >= 0.5).astype(int), positive[n].astype(int), 2)[0]
        for n in names[:MOST_PANELS]
    }
    share = {n: np.diagonal(t) / np.maximum(t.sum(1), 1) for n, t in tables.items()}
    told = "; ".join(f"{n}: {100 * s[1]:.0f} % and {100 * s[0]:.0f} %" for n, s in share.items())
    each = _each_case(last)
    drawn.append(
        Drawn(
            "confusion",
            plots.confusion(tables, {n: ("0", "1") for n in tables}),
            f"Confusion matrices at 0.5. Found of the positive, and of the negative: {told}.",
            f"A label counts as predicted from a probability of 0.5; unknown ones are left out. {_first(names, tables)}{each}",
        )
    )
    points, errors = {}, {}
    two = {n: (np.stack([1 - stated[n], stated[n]], 1), positive[n].astype(int)) for n in names}
    every = {n: float(calibration.expected_calibration_error(*two[n])[0]) for n in names}
    for n in sorted(_lowest({n: -error for n, error in every.items()}), key=names.index):
        errors[n] = every[n]
        points[f"{n}, ECE {errors[n]:.3f}"] = calibration.reliability(*two[n])
    told = ", ".join(f"{n} {error:.3f}" for n, error in errors.items())
    drawn.append(
        Drawn(
            "calibration",
            plots.reliability(points, stated),
            f"Reliability diagram of each label; expected calibration errors: {told}.",
            f"In tenths of the stated probability, all labels counted together. {_few(names, errors)}{each}",
        )
    )
    return drawn


def _label_arrays(found: Result) -> tuple[dict, dict, np.ndarray]:
    """Truth (n,) of 0, 1, NaN and score (n,) by label, and folds (n,)."""
    truth = {n: numbers(found.cases, f"label_{n}") for n in found.names}
    score = {n: numbers(found.cases, f"score_{n}") for n in found.names}
    return truth, score, numbers(found.cases, "fold").astype(int)


def _label_slides(found: Result) -> list[Slide]:
    names = found.names
    truth = results.matrix(found.slides, "label_", names)
    score = results.matrix(found.slides, "score_", names)
    made = []
    for row, true, stated in zip(found.slides, truth, score, strict=True):
        known = np.isfinite(true)
        missed = [n for n, t, s, k in zip(names, true, stated, known, strict=True) if k and (s >= 0.5) != (t > 0)]  # fmt: skip
        mark = "" if not known.any() else "wrong" if missed else "right"
        cells = {
            "truth": _positive(names, true > 0, known),
            "prediction": _positive(names, stated >= 0.5, np.ones(len(names), bool)),
            "probabilities": ", ".join(f"{n} {s:.2f}" for n, s in zip(names, stated, strict=True)),
        }
        # How far from 0.5 in sum, so that the surest stand first among right and among wrong.
        sure = float(np.abs(stated - 0.5)[known].sum()) if known.any() else 0.0
        told = f"{cells['truth']}: " + (
            f"wrong about {', '.join(missed)}" if missed else "every known label right"
        )
        told += f"; probabilities {cells['probabilities']}"
        made.append(_slide(row, cells, mark, told, sure))
    return made


def _positive(names: list[str], holds: np.ndarray, known: np.ndarray) -> str:
    """The labels that hold, and those that are unknown."""
    yes = [n for n, h, k in zip(names, holds, known, strict=True) if h and k]
    unknown = [n for n, k in zip(names, known, strict=True) if not k]
    text = ", ".join(yes) or "none"
    return text + (f" (unknown: {', '.join(unknown)})" if unknown else "")


# --- number


def _number_figures(found: Mapping[str, Result]) -> list[Drawn]:
    last = list(found.values())[-1]
    truth, predicted = numbers(last.cases, "truth"), numbers(last.cases, "prediction")
    measured = [words.value(last.metrics["rows"]["head"], last.measure)]
    measured += [
        f"{words.measure_name(name)} {last.value(name):.3g}"
        for name in ("r2", "mae")
        if last.value(name) is not None
    ]
    note = ", ".join(measured)
    name = last.metrics["task"]
    return [
        Drawn(
            "prediction",
            plots.truth_and_prediction(truth, predicted, name, "\n".join(measured)),
            f"Predicted against true {name}: {note}.",
            f"A point a case; on the dashed line the prediction is perfect. {_each_case(last)}",
        )
    ]


def _number_slides(found: Result) -> list[Slide]:
    made = []
    for row in found.slides:
        true, said = float(row["truth"]), float(row["prediction"])
        cells = {
            "truth": f"{true:.3g}",
            "prediction": f"{said:.3g}",
            "error": f"{said - true:+.2g}",
        }
        told = f"true {true:.3g}, predicted {said:.3g}"
        made.append(_slide(row, cells, "", told, abs(said - true)))
    return made


# --- survival


def _survival_figures(found: Mapping[str, Result]) -> list[Drawn]:
    last = list(found.values())[-1]
    time, event = numbers(last.cases, "time_months"), numbers(last.cases, "event")
    high = results.high_risk(last.cases)
    halves = {n: m for n, m in (("low risk", ~high), ("high risk", high)) if m.any()}
    curves = {name: kaplan_meier(time[m], event[m]) for name, m in halves.items()}
    p = logrank(time, event, high)[1]
    note = (
        f"log-rank p {words.p_value(p)}" if np.isfinite(p) else "one group only: no log-rank test"
    )
    ends = ", ".join(f"{n} {c.survival[-1]:.2f}" for n, c in curves.items())
    drawn = [
        Drawn(
            "kaplan_meier",
            plots.kaplan_meier(curves, {n: time[m] for n, m in halves.items()}, note),
            f"Kaplan–Meier curves of the halves by predicted risk: {note}; "
            f"share without event at the end of each: {ends}.",
            "Halves at each fold's own median risk; bands are 95 % intervals, ticks are censored patients. "
            + _each_case(last, "The log-rank p then counts a case several times and is too small."),
        )
    ]
    fold, risk = numbers(last.cases, "fold"), numbers(last.cases, "risk")
    rank = np.zeros(len(risk))
    for f in np.unique(fold):
        mine = fold == f
        rank[mine] = (stats.rankdata(risk[mine]) - 0.5) / mine.sum()
    groups = {"event": rank[event > 0], "censored": rank[event <= 0]}
    medians = ", ".join(f"{n} {np.median(v):.2f}" for n, v in groups.items() if len(v))
    drawn.append(
        Drawn(
            "risk",
            plots.strips(groups, "rank of the risk within its fold"),
            f"Rank of the predicted risk, median of those with and without an event: {medians}.",
            "A point a case; risks of different folds are comparable by rank alone. "
            + _each_case(last),
        )
    )
    return drawn


def _survival_slides(found: Result) -> list[Slide]:
    cases = zip(found.cases, results.high_risk(found.cases), strict=True)
    half = {(row["case_id"], row["fold"]): high for row, high in cases}
    risk, fold = numbers(found.slides, "risk"), numbers(found.slides, "fold")
    made = []
    for row, value in zip(found.slides, risk, strict=True):
        mine = risk[fold == float(row["fold"])]
        share = float((mine < value).sum() + 0.5 * (mine == value).sum()) / len(mine)
        state = "event" if float(row["event"]) > 0 else "censored"
        cells = {
            "months": f"{float(row['time_months']):.1f}",
            "state": state,
            "risk": f"{value:.3g}",
            "half": "high" if half.get((row["case_id"], row["fold"])) else "low",
        }
        told = f"risk above {100 * share:.0f} % of its fold; {state} at {cells['months']} months"
        made.append(_slide(row, cells, "", told, share))
    return made


FIGURES: dict[str, Callable[[Mapping[str, Result]], list[Drawn]]] = {
    "classes": _class_figures,
    "labels": _label_figures,
    "number": _number_figures,
    "nll": _survival_figures,
    "cox": _survival_figures,
}
SLIDES: dict[str, Callable[[Result], list[Slide]]] = {
    "classes": _class_slides,
    "labels": _label_slides,
    "number": _number_slides,
    "nll": _survival_slides,
    "cox": _survival_slides,
}


# --- shared


def _roc(found: Mapping[str, Result], curves: Mapping[str, plots.Line]) -> Drawn:
    last = list(found.values())[-1]
    group = "classes" if last.kind == "classes" else "labels"
    if len(found) == 1:
        message = words.value(last.metrics["rows"]["head"], last.measure)
        of = _few(_compared(last.names) if group == "classes" else last.names, curves)
        of = (
            (", each class against the others" if group == "classes" else ", one a label")
            + ". "
            + of
            if len(curves) > 1
            else ". "
        )
    else:
        heads = {bag: each.metrics["rows"]["head"] for bag, each in found.items()}
        message = ", ".join(
            f"{bag} {words.score(head, last.measure)}" for bag, head in heads.items()
        )
        of = f", averaged over the {group}. " if group == "labels" or len(last.names) > 2 else ". "
    return Drawn(
        "roc",
        plots.roc(curves),
        f"ROC curves of {last.metrics['task']}: {message}.",
        f"ROC: the mean of the folds' curves{of}The area under a curve is its AUROC.",
    )


def _against(
    score: Mapping[str, np.ndarray],
    positive: Mapping[str, np.ndarray],
    folds: Mapping[str, np.ndarray],
) -> dict[str, plots.Line]:
    """ROC of each name against the rest, its AUROC beside the name; of many the hardest."""
    two = {n: (np.stack([-s, s], 1), positive[n].astype(int), folds[n]) for n, s in score.items()}
    area = {n: auroc.auroc(*each) for n, each in two.items()}
    return {
        f"{n}, {area[n]:.2f}" if np.isfinite(area[n]) else n: auroc.roc(*two[n])
        for n in score
        if n in _lowest(area)
    }


def _lowest(values: Mapping[str, float]) -> list[str]:
    """Names of the smallest values, as many as one picture shows."""
    return sorted(values, key=lambda name: np.nan_to_num(values[name], nan=np.inf))[:MOST_CURVES]


def _few(names: Sized, drawn: Sized) -> str:
    """A sentence where not all are drawn, else nothing."""
    if len(drawn) >= len(names):
        return ""
    return f"Of {len(names)}, the {len(drawn)} hardest are drawn. "


def _first(names: Sized, drawn: Sized) -> str:
    return "" if len(drawn) == len(names) else f"Of {len(names)}, the first {len(drawn)}. "


def _mean_roc(found: Result) -> plots.Line:
    """Mean of the classes' or labels' curves."""
    if found.kind == "classes":
        return auroc.roc(*_class_arrays(found))
    truth, score, folds = _label_arrays(found)
    x, curves = np.linspace(0, 1, 501), []
    for n in found.names:
        known = np.isfinite(truth[n])
        two = np.stack([-score[n], score[n]], 1)[known]
        x, y = auroc.roc(two, truth[n][known].astype(int), folds[known])
        curves += [y] if np.isfinite(y).all() else []
    return x, np.mean(curves, 0) if curves else np.full(len(x), np.nan)


def _precision_recall(score: Mapping[str, np.ndarray], positive: Mapping[str, np.ndarray]) -> Drawn:
    curves, prevalence, told = {}, {}, []
    area = {n: float(metrics.average_precision(s, positive[n])[0]) for n, s in score.items()}
    for name in (n for n in score if n in _lowest(area)):
        label = f"{name}, {area[name]:.2f}" if np.isfinite(area[name]) else name
        curves[label] = results.precision_recall(score[name], positive[name])
        prevalence[label] = float(positive[name].mean())
        told.append(f"{name} {words.plain(area[name])} (prevalence {prevalence[label]:.2f})")
    return Drawn(
        "precision_recall",
        plots.precision_recall(curves, prevalence),
        f"Precision over recall, average precision: {', '.join(told)}.",
        f"Precision over recall, all folds together; in the legend the average precision. {_few(score, curves)}"
        "Dotted: the prevalence, which guessing gives.",
    )


def _slide(row: Row, cells: dict[str, str], mark: str, told: str, rank: float) -> Slide:
    return Slide(row["slide_id"], row["case_id"], row["fold"], cells, mark, told, float(rank))


def _each_case(found: Result, consequence: str = "") -> str:
    """A sentence where repeated folds test a case several times, else nothing."""
    if len({row["case_id"] for row in found.cases}) == len(found.cases):
        return ""
    return f"A case counts once for each fold that tested it. {consequence}".strip()
