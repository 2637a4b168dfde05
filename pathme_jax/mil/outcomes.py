"""What can be predicted of a slide: how each kind is read from the label table, trained, judged and written down.

A kind knows its truth as a row of numbers a bag, NaN where unknown: class index; 0 or 1 of each label; number; months
and event. All else in a cross-validation is the same for all kinds (`mil.crossval`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from scipy import stats
from sklearn.linear_model import Ridge

from pathme_jax.evaluation import classification, metrics, survival
from pathme_jax.evaluation.auroc import auroc
from pathme_jax.evaluation.intervals import bootstrap_weights, permutation_p
from pathme_jax.evaluation.linear_probe import cox_ridge
from pathme_jax.mil.baselines import logistic
from pathme_jax.mil.folds import TRAIN
from pathme_jax.mil.tasks import Task
from pathme_jax.records.survival import bin_of, quantile_edges

QUARTERS = ["lowest quarter", "second quarter", "third quarter", "highest quarter"]
ENOUGH = 10  # bags of a stratum, or there are none: nobody is refused for want of the censored
ALIKE = ["patient"]
DRAWS = 1000  # of every bootstrap and permutation test
PENALTY = 1.0  # of the ridges, times the number of features


@dataclasses.dataclass
class Found:
    """Out-of-fold answers; a row is one (fold, case).

    Attributes:
        scores: (n, c). truth: (n, w). folds: (n,) int, which model. cases: (n,) text.
    """

    scores: np.ndarray
    truth: np.ndarray
    folds: np.ndarray
    cases: np.ndarray


class Outcome(Protocol):
    """What one kind of task must tell; shapes as in the module's docstring."""

    @property
    def task(self) -> Task: ...

    @property
    def measure(self) -> str:
        """The primary one."""
        ...

    def strata(self, truth: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """(n,) what folds are stratified by, -1 where unknown, and the names of the strata."""
        ...

    def lacks(self, truth: np.ndarray) -> str:
        """What a training part of this truth (k, w) lacks to be learned from, or ""."""
        ...

    def balance(self, truth: np.ndarray) -> np.ndarray:
        """(n,) groups that weigh the same in training."""
        ...

    def targets(self, part: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """(n, width of the task) float32 of one member, see `mil.tasks`; from its training part alone."""
        ...

    def scale(self, part: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
        """What a member's predictions are multiplied by, and what is added."""
        ...

    def baseline(
        self, vectors: np.ndarray, part: np.ndarray, truth: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """(n, c) scores of all bags by a linear model of one vector a bag, fitted on a member's training part."""
        ...

    def measures(self, found: Found, seed: int) -> dict[str, Any]: ...

    def summary(self, truth: np.ndarray) -> dict[str, Any]:
        """Of the cases' truth (k, w), for metrics.json."""
        ...

    def evidence(self, truth: np.ndarray) -> int:
        """How many cases speak: events, or cases."""
        ...

    def columns(self, truth: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        """One row of a table of predictions."""
        ...


@dataclasses.dataclass(frozen=True)
class Classes:
    task: Task
    measure: str = "auroc"

    def strata(self, truth: np.ndarray) -> tuple[np.ndarray, list[str]]:
        return np.nan_to_num(truth[:, 0], nan=-1).astype(int), list(self.task.names)

    def lacks(self, truth: np.ndarray) -> str:
        return "" if _varies(truth[:, 0]) else "fewer than two classes"

    def balance(self, truth: np.ndarray) -> np.ndarray:
        return truth[:, 0]

    def targets(self, part: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return truth.astype(np.float32)

    def scale(self, part: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
        return 1.0, 0.0

    def baseline(
        self, vectors: np.ndarray, part: np.ndarray, truth: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        train = weights > 0
        labels = truth[train, 0].astype(int)
        return logistic(vectors, train, labels, weights[train], len(self.task.names))

    def measures(self, found: Found, seed: int) -> dict[str, Any]:
        labels = found.truth[:, 0].astype(int)
        rows = classification.OutOfFold(found.scores, labels, found.folds, found.cases)

        def measure(weights: np.ndarray | None) -> dict[str, np.ndarray]:
            return metrics.classification(found.scores, labels, found.folds, weights)

        weights = bootstrap_weights(found.cases, labels, DRAWS, seed)
        return classification.measures(rows, seed) | {
            "measures": metrics.with_intervals(measure, weights)
        }

    def summary(self, truth: np.ndarray) -> dict[str, Any]:
        of = truth[:, 0].tolist()
        return {"cases_per_class": {name: of.count(i) for i, name in enumerate(self.task.names)}}

    def evidence(self, truth: np.ndarray) -> int:
        return len(truth)

    def columns(self, truth: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        return {"label": self.task.names[int(truth[0])]} | _scores(self.task.names, scores)


@dataclasses.dataclass(frozen=True)
class Labels:
    """Several that may hold together. Folds are stratified by the rarest; a patient counts where it is known."""

    task: Task
    measure: str = "auroc"

    def strata(self, truth: np.ndarray) -> tuple[np.ndarray, list[str]]:
        rarest = int(np.nansum(truth, 0).argmin())
        name = self.task.names[rarest]
        return np.nan_to_num(truth[:, rarest], nan=-1).astype(int), [f"not {name}", name]

    def lacks(self, truth: np.ndarray) -> str:
        return "" if any(map(_varies, truth.T)) else "no label that differs between slides"

    def balance(self, truth: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(truth).all(1), np.nan, 0)

    def targets(self, part: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return truth.astype(np.float32)

    def scale(self, part: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
        return 1.0, 0.0

    def baseline(
        self, vectors: np.ndarray, part: np.ndarray, truth: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        scores = np.full((len(vectors), truth.shape[1]), 0.5)
        for i, of in enumerate(truth.T):
            train = (weights > 0) & ~np.isnan(of)
            if len(np.unique(of[train])) > 1:
                scores[:, i] = logistic(vectors, train, of[train].astype(int), weights[train], 2)[
                    :, 1
                ]
        return scores

    def measures(self, found: Found, seed: int) -> dict[str, Any]:
        truth = np.where(np.isnan(found.truth), -1, found.truth)
        weights = bootstrap_weights(found.cases, np.zeros(len(truth)), DRAWS, seed)

        def measure(weights: np.ndarray | None) -> dict[str, np.ndarray]:
            return metrics.multilabel(found.scores, truth, found.folds, weights)

        def mean(of: np.ndarray) -> float:
            return _mean_auroc(found.scores, of, found.folds)

        measured = metrics.with_intervals(measure, weights)
        return {
            "auroc": measured["auroc"]["value"],
            "interval": measured["auroc"]["interval"],
            "permutation_p": permutation_p(mean, truth, found.cases, draws=DRAWS, seed=seed),
            **_over_folds("auroc", found, lambda some: _mean_auroc(some.scores, some.truth, None)),
            "pooled_auroc": _mean_auroc(found.scores, truth, None),
            "cases": len(np.unique(found.cases)),
            "measures": measured,
            "labels": {
                name: _label_auroc(found.scores[:, i], truth[:, i], found.folds)
                for i, name in enumerate(self.task.names)
            },
        }

    def summary(self, truth: np.ndarray) -> dict[str, Any]:
        counts = np.nansum(truth, 0).astype(int).tolist()
        return {"cases_per_class": dict(zip(self.task.names, counts, strict=True))}

    def evidence(self, truth: np.ndarray) -> int:
        return len(truth)

    def columns(self, truth: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        known = {
            f"label_{name}": "" if np.isnan(value) else int(value)
            for name, value in zip(self.task.names, truth, strict=True)
        }
        return known | _scores(self.task.names, scores)


@dataclasses.dataclass(frozen=True)
class Number:
    """Standardised by each member's training part; folds are stratified by its quarters."""

    task: Task
    measure: str = "pearson"

    def strata(self, truth: np.ndarray) -> tuple[np.ndarray, list[str]]:
        value = truth[:, 0]
        known = ~np.isnan(value)
        quarter = np.full(len(value), -1)
        if known.sum() < 4 * ENOUGH:
            return np.where(known, 0, -1), ALIKE
        # By rank, since many may share a value; they share a quarter, too, as slides of one case must.
        rank = stats.rankdata(value[known])
        quarter[known] = (4 * (rank - 0.5) / known.sum()).astype(int)
        return quarter, QUARTERS

    def lacks(self, truth: np.ndarray) -> str:
        return "" if _varies(truth[:, 0]) else "no two numbers that differ"

    def balance(self, truth: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(truth[:, 0]), np.nan, 0)

    def targets(self, part: np.ndarray, truth: np.ndarray) -> np.ndarray:
        std, mean = self.scale(part, truth)  # of nothing but the training part
        return ((truth - mean) / std).astype(np.float32)

    def scale(self, part: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
        train = truth[part == TRAIN, 0]
        train = train[~np.isnan(train)]
        std = float(train.std())
        return (std if std > 1e-12 else 1.0), float(train.mean())

    def baseline(
        self, vectors: np.ndarray, part: np.ndarray, truth: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        train = weights > 0
        model = Ridge(PENALTY * vectors.shape[1])
        model.fit(vectors[train], truth[train, 0], sample_weight=weights[train])
        return model.predict(vectors)[:, None]

    def measures(self, found: Found, seed: int) -> dict[str, Any]:
        said, truth = found.scores[:, 0], found.truth[:, 0]

        def pearson(of: np.ndarray) -> float:
            return float(within_folds(said, of, found.folds, None)[0])

        weights = bootstrap_weights(found.cases, np.zeros(len(truth)), DRAWS, seed)
        measured = metrics.with_intervals(lambda w: metrics.regression(said, truth, w), weights)
        within = metrics.with_intervals(
            lambda w: {"pearson": within_folds(said, truth, found.folds, w)}, weights
        )["pearson"]
        spearman: Any = stats.spearmanr(said, truth)
        return {
            "pearson": within["value"],
            "interval": within["interval"],
            "permutation_p": permutation_p(pearson, truth, found.cases, draws=DRAWS, seed=seed),
            **_over_folds("pearson", found, _pearson),
            "pooled_pearson": measured["pearson"]["value"],
            "spearman": float(spearman[0]),
            "cases": len(np.unique(found.cases)),
            "measures": measured,
        }

    def summary(self, truth: np.ndarray) -> dict[str, Any]:
        return {"mean": truth.mean(), "std": truth.std()}

    def evidence(self, truth: np.ndarray) -> int:
        return len(truth)

    def columns(self, truth: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        return {"truth": truth[0], "prediction": scores[0]}


@dataclasses.dataclass(frozen=True)
class TimeToEvent:
    """Months and event; folds are stratified by the event, bins are quantiles of a member's training events."""

    task: Task
    measure: str = "c_index"

    def strata(self, truth: np.ndarray) -> tuple[np.ndarray, list[str]]:
        event = np.nan_to_num(truth[:, 1], nan=-1).astype(int)
        if min((event == 0).sum(), (event == 1).sum()) < ENOUGH:
            return np.where(event < 0, -1, 0), ALIKE
        return event, ["censored", "event"]

    def lacks(self, truth: np.ndarray) -> str:
        return "" if (truth[:, 1] == 1).any() else "no event"

    def balance(self, truth: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(truth[:, 1]), np.nan, 0)

    def targets(self, part: np.ndarray, truth: np.ndarray) -> np.ndarray:
        time, event = truth.T
        if self.task.kind == "cox":
            return truth.astype(np.float32)
        known = ~np.isnan(event)
        mine = (part == TRAIN) & known
        bins = np.full(len(time), np.nan)
        edges = quantile_edges(time[mine], event[mine], self.task.bins)
        bins[known] = bin_of(time[known], edges)
        return np.stack([bins, event], 1).astype(np.float32)

    def scale(self, part: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
        return 1.0, 0.0

    def baseline(
        self, vectors: np.ndarray, part: np.ndarray, truth: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        train = weights > 0
        penalty = PENALTY * vectors.shape[1]
        b = cox_ridge(vectors[train], truth[train, 0], truth[train, 1], penalty)
        return (vectors @ b)[:, None]

    def measures(self, found: Found, seed: int) -> dict[str, Any]:
        rows = survival.OutOfFold(
            found.scores[:, 0],
            found.truth[:, 0],
            found.truth[:, 1].astype(int),
            found.folds,
            found.cases,
        )
        result = survival.measures(rows, seed, DRAWS)
        c = {"value": result["c_index"], "interval": result["interval"]}
        return result | {"measures": {"c_index": c}}

    def summary(self, truth: np.ndarray) -> dict[str, Any]:
        return {"events": int(truth[:, 1].sum())}

    def evidence(self, truth: np.ndarray) -> int:
        return int(truth[:, 1].sum())

    def columns(self, truth: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
        return {"time_months": truth[0], "event": int(truth[1]), "risk": scores[0]}


def _varies(values: np.ndarray) -> bool:
    return len(np.unique(values[~np.isnan(values)])) > 1


def _scores(names: tuple[str, ...], scores: np.ndarray) -> dict[str, float]:
    return {f"score_{name}": score for name, score in zip(names, scores, strict=True)}


def _mean_auroc(scores: np.ndarray, truth: np.ndarray, folds: np.ndarray | None) -> float:
    """Mean over the labels of their AUROC, each on the rows where it is known."""
    each = [_label_auroc(scores[:, i], truth[:, i], folds) for i in range(scores.shape[1])]
    known = [value for value in each if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _label_auroc(score: np.ndarray, truth: np.ndarray, folds: np.ndarray | None) -> float:
    known = truth >= 0
    pair = np.stack([-score, score], 1)[known]
    return auroc(pair, truth[known].astype(int), None if folds is None else folds[known])


def within_folds(
    said: np.ndarray, truth: np.ndarray, folds: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """(r,) Pearson's r of what exceeds the fold's mean: pooled plainly, a fold held out pulls the training mean, and so
    every prediction, away from itself."""
    x, y = said.astype(float), truth.astype(float)
    for fold in np.unique(folds):
        mine = folds == fold
        x[mine], y[mine] = x[mine] - x[mine].mean(), y[mine] - y[mine].mean()
    return metrics.regression(x, y, weights)["pearson"]


def _pearson(found: Found) -> float:
    return float(metrics.regression(found.scores[:, 0], found.truth[:, 0])["pearson"][0])


def _over_folds(name: str, found: Found, measure: Callable[[Found], float]) -> dict[str, Any]:
    each = []
    for fold in np.unique(found.folds):
        mine = found.folds == fold
        each.append(
            measure(Found(*(getattr(found, f.name)[mine] for f in dataclasses.fields(found))))
        )
    known = [value for value in each if np.isfinite(value)]
    mean, std = (np.mean(known), np.std(known)) if known else (np.nan, np.nan)
    return {f"fold_{name}": each, "fold_mean": mean, "fold_std": std}
