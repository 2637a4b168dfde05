"""What a bag classifier must beat: logistic regression on one vector per slide, in the same folds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from pathme_jax.errors import UserError
from pathme_jax.files import read_csv
from pathme_jax.mil.bags import MilBag


def logistic(
    vectors: np.ndarray, labels: np.ndarray, weights: np.ndarray, classes: int, pairs: np.ndarray
) -> np.ndarray:
    """(q, c) class probabilities of q pairs of member and bag.

    Args:
        vectors: (n, d) one per bag, standardised here by each member's training part.
        labels, weights: (p, n) of each member; it trains where its weights are above zero.
        pairs: (q, 2) member and bag.
    """
    scores = np.zeros((len(pairs), classes))
    for member in np.unique(pairs[:, 0]):
        train = weights[member] > 0
        mean, std = vectors[train].mean(0), vectors[train].std(0)
        x = (vectors - mean) / np.where(std > 1e-8, std, 1)
        model = LogisticRegression(max_iter=1000)
        model.fit(x[train], labels[member, train], sample_weight=weights[member, train])
        mine = np.flatnonzero(pairs[:, 0] == member)
        scores[np.ix_(mine, model.classes_)] = model.predict_proba(x[pairs[mine, 1]])
    return scores


def read_colour(path: Path, bags: list[MilBag]) -> np.ndarray:
    """(n, 3) mean colour of each bag, from a CSV `slide_id,r,g,b`.

    Raises:
        UserError: a slide is not in it, or a value is not a number.
    """
    try:
        rows = {row["slide_id"]: [float(row[c]) for c in "rgb"] for row in read_csv(path)}
        return np.array([np.mean([rows[s.slide_id] for s in bag.slides], axis=0) for bag in bags])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: no mean colour ({error!r})",
            "Expected a CSV slide_id,r,g,b with a row for every labelled slide",
        ) from error
