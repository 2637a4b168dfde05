"""What frozen features tell: a kNN vote and a logistic regression, cross-validated over cases.

NumPy and scikit-learn only. Both probes are the usual yardsticks of self-supervised learning: kNN needs no
training and sees how classes lie in feature space, the linear probe finds any direction that separates them.
"""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pathme_jax.errors import UserError
from pathme_jax.evaluation.auroc import auroc

# Inverse strength of the L2 penalty, on standardised features. Fixed: a probe asked every n steps must change
# with the features alone, and a C chosen anew each time adds noise and most of the cost.
C = 0.1


def knn(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Weighted nearest neighbours by cosine, as in DINO's evaluation (Caron 2021, after Wu 2018).

    A neighbour at cosine s votes for its class with weight exp(s / temperature).

    Args:
        train_x: (n, d); train_y: (n,) int from 0, every class present; test_x: (m, d).
        k: neighbours, or all n where there are fewer.

    Returns:
        (m, classes), rows sum to 1.
    """
    near = _unit(test_x) @ _unit(train_x).T
    k = min(k, len(train_y))
    chosen = np.argpartition(-near, k - 1, axis=1)[:, :k]
    cosine = np.take_along_axis(near, chosen, 1)
    weight = np.exp((cosine - cosine.max(1, keepdims=True)) / temperature)
    votes = np.eye(train_y.max() + 1)[train_y[chosen]]
    return np.einsum("mk,mkc->mc", weight / weight.sum(1, keepdims=True), votes)


def linear(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    """Logistic regression on standardised features with a fixed penalty `C`.

    Args:
        train_x: (n, d); train_y: (n,) int from 0, every class present; test_x: (m, d).

    Returns:
        (m, classes) probabilities.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=2000))
    return model.fit(train_x, train_y).predict_proba(test_x)


def probe(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, seed: int, folds: int = 5
) -> dict[str, float]:
    """Both probes, out of fold: no group is on both sides, and folds are stratified by class.

    Args:
        features: (n, d).
        labels: (n,) the class of each row, text or numbers.
        groups: (n,) what must not be split, usually the case.
        seed: of the folds.

    Returns:
        "knn/accuracy", "linear/accuracy": share of rows whose most probable class is theirs.
        "knn/auroc", "linear/auroc": one against the rest, mean over classes, rows of one fold compared (see
        `evaluation.auroc`).
        "chance": the accuracy of always naming the commonest class; an AUROC's is 0.5.

    Raises:
        UserError: a feature is not finite, there is one class only, or a class has fewer groups than
            folds.
    """
    features, groups = np.asarray(features, np.float64), np.asarray(groups)
    names, y = np.unique(labels, return_inverse=True)
    _check(features, names, y, groups, folds)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    scores = {"knn": np.zeros((len(y), len(names))), "linear": np.zeros((len(y), len(names)))}
    fold_of = np.zeros(len(y), int)
    for fold, (train, test) in enumerate(splitter.split(features, y, groups)):
        fold_of[test] = fold
        scores["knn"][test] = knn(features[train], y[train], features[test])
        scores["linear"][test] = linear(features[train], y[train], features[test])
    found = {}
    for name, score in scores.items():
        found[f"{name}/accuracy"] = float(np.mean(score.argmax(1) == y))
        found[f"{name}/auroc"] = auroc(score, y, fold_of)
    return {**found, "chance": float(np.bincount(y).max() / len(y))}


def _check(
    features: np.ndarray, names: np.ndarray, y: np.ndarray, groups: np.ndarray, folds: int
) -> None:
    bad = int((~np.isfinite(features)).any(1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(features)} rows of features are not finite",
            "The encoder that made them has diverged, or an image is broken",
        )
    if len(names) < 2:
        raise UserError(
            f"only one class, {names[0]!s}, to probe", "Label examples of at least two classes"
        )
    for i, name in enumerate(names):
        count = len(np.unique(groups[y == i]))
        if count < folds:
            raise UserError(
                f"class {name!s} has {count} group(s), fewer than the {folds} folds",
                "Label more cases of it, blank that label, or lower folds; a training run's probe can also keep"
                ' only fields apart (config.probe.split = "tile")',
            )


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
