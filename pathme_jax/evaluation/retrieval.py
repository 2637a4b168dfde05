"""Looking up similar images or slides: are the nearest training rows of the query's class?"""

from __future__ import annotations

import dataclasses

import numpy as np

CHUNK = 256  # queries whose distances are held at once


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """How neighbours are found.

    Attributes:
        standardise: features by the training part's mean and deviation first (GPFM); else as they are.
        top: how many neighbours or guesses are looked at.
    """

    standardise: bool = True
    top: tuple[int, ...] = (1, 3, 5)


def retrieve(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    classes: int,
    settings: Retrieval,
) -> dict[str, np.ndarray]:
    """What each query finds by Euclidean distance; name to (m,) values in [0, 1].

    recall@K: a row of its class is among the K nearest (UNI's Acc@K). mvacc@5: most of the 5 nearest are of it, the
    nearer class winning a tie. top@K: its class is among the K with most votes, where the C nearest of C classes vote
    with weights 1, 0.9, 0.8, … (GPFM; like there they fall below zero for C > 11); the class nearer by vote order,
    then by number, goes first. map: mean over its class's rows of the precision at each (average precision).
    """
    x, q = np.asarray(train_x, np.float64), np.asarray(test_x, np.float64)
    if settings.standardise:
        mean, std = x.mean(0), x.std(0)
        std = np.where(std > 1e-12, std, 1)
        x, q = (x - mean) / std, (q - mean) / std
    squares = (x * x).sum(1)
    parts = []
    for start in range(0, len(q), CHUNK):
        block = q[start : start + CHUNK]
        near = np.argsort(squares - 2 * block @ x.T, axis=1, kind="stable")
        parts.append(_measures(train_y[near], test_y[start : start + CHUNK], classes, settings.top))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measures(
    near: np.ndarray, label: np.ndarray, classes: int, top: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """near: (m, n) labels by distance; label: (m,)."""
    same = near == label[:, None]
    weights = 1 - 0.1 * np.arange(min(classes, near.shape[1]))
    guesses = np.argsort(-_votes(near, weights, classes), axis=1, kind="stable")
    found = {f"recall@{k}": same[:, :k].any(1).astype(float) for k in top}
    found |= {
        f"top@{k}": (guesses[:, :k] == label[:, None]).any(1).astype(float)
        for k in top
        if k < classes
    }
    # Thinner weights for later rows break ties only: they sum to less than one vote.
    five = _votes(near, 1 + 1e-3 * np.arange(min(5, near.shape[1]), 0, -1), classes)
    found["mvacc@5"] = (five.argmax(1) == label).astype(float)
    hits = np.cumsum(same, 1)
    precision = (same * hits / np.arange(1, near.shape[1] + 1)).sum(1)
    found["map"] = precision / np.maximum(hits[:, -1], 1)
    return found


def _votes(near: np.ndarray, weights: np.ndarray, classes: int) -> np.ndarray:
    """(m, c) sums of the weights of the nearest rows by their class."""
    return np.einsum("k,mkc->mc", weights, np.eye(classes)[near[:, : len(weights)]])


def macro(values: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(r,) means over the classes present of the mean of their queries; weights (r, n) as elsewhere."""
    w = np.ones((1, len(labels))) if weights is None else weights
    each = [
        (w[:, labels == c] @ values[labels == c]) / w[:, labels == c].sum(1)
        for c in np.unique(labels)
    ]
    return np.mean(each, axis=0)
