"""What a bag classifier must beat: a linear model of one vector per slide, in the same folds."""

from __future__ import annotations

import numpy as np
from sklearn.linear_model import LogisticRegression


def logistic(
    x: np.ndarray, train: np.ndarray, labels: np.ndarray, weights: np.ndarray, classes: int
) -> np.ndarray:
    """(n, c) class probabilities of all rows of x (n, d), from those of `train` (n,) bool and their k labels and
    weights; zero for a class that is not among them."""
    if len(np.unique(labels)) == 1:
        return np.tile(np.eye(classes)[labels[0]], (len(x), 1))
    model = LogisticRegression(max_iter=1000)
    model.fit(x[train], labels, sample_weight=weights)
    scores = np.zeros((len(x), classes))
    scores[:, model.classes_] = model.predict_proba(x)
    return scores


def standardised(vectors: np.ndarray, train: np.ndarray) -> np.ndarray:
    """(n, d) by mean and deviation of the rows of `train`."""
    mean, std = vectors[train].mean(0), vectors[train].std(0)
    return (vectors - mean) / np.where(std > 1e-8, std, 1)
