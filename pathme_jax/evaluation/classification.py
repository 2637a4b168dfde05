"""All measures of one classifier's out-of-fold scores."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from sklearn.metrics import balanced_accuracy_score

from pathme_jax.evaluation.auroc import auroc, bootstrap_interval, permutation_p


@dataclasses.dataclass
class OutOfFold:
    """Scores of cases by models that did not train on them; a row is one (fold, case).

    Attributes:
        scores: (n, c).
        labels: (n,) int.
        folds: (n,) int, which model.
        cases: (n,) text.
    """

    scores: np.ndarray
    labels: np.ndarray
    folds: np.ndarray
    cases: np.ndarray


def measures(found: OutOfFold, seed: int = 0) -> dict[str, Any]:
    """`auroc` compares cases within a fold and is the primary measure (see `evaluation.auroc` for why);
    `pooled_auroc` compares all; accuracies are of the most probable class."""
    scores, labels, folds, cases = found.scores, found.labels, found.folds, found.cases
    per_fold = [auroc(scores[folds == f], labels[folds == f]) for f in np.unique(folds)]
    known = [value for value in per_fold if np.isfinite(value)]
    predicted = scores.argmax(1)
    return {
        "auroc": auroc(scores, labels, folds),
        "interval": bootstrap_interval(scores, labels, folds, cases, seed=seed),
        "permutation_p": permutation_p(scores, labels, folds, cases, seed=seed),
        "fold_auroc": per_fold,
        "fold_mean": np.mean(known) if known else np.nan,
        "fold_std": np.std(known) if known else np.nan,
        "pooled_auroc": auroc(scores, labels),
        "pooled_interval": bootstrap_interval(scores, labels, None, cases, seed=seed),
        "accuracy": np.mean(predicted == labels),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "cases": len(np.unique(cases)),
    }
