"""SimpleShot (Wang 2019): the nearest class mean of centred features of unit length, as in UNI's evaluation."""

from __future__ import annotations

import dataclasses

import numpy as np

from pathme_jax.errors import UserError

CHUNK = 64  # episodes whose products are formed at once


@dataclasses.dataclass(frozen=True)
class SimpleShot:
    """What episodes are made of.

    Attributes:
        shots: examples a class; each is measured where every class has as many.
        episodes: random supports of each.
        ways: classes an episode, None for all.
    """

    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    episodes: int = 1000
    ways: int | None = None


def prototypes(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, classes: int
) -> np.ndarray:
    """(m, c) minus the distance to each class's mean, all training rows being the support; -inf for an absent class."""
    mean = train_x.mean(0)
    source, query = _unit(train_x - mean), _unit(test_x - mean)
    scores = np.full((len(test_x), classes), -np.inf)
    for c in np.unique(train_y):
        scores[:, c] = -np.linalg.norm(query - source[train_y == c].mean(0), axis=1)
    return scores


def episodes(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    shots: int,
    *,
    ways: int | None = None,
    number: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """(number,) balanced accuracies, each of one random support of `shots` rows a class and all test rows of its classes.

    Centring is by the support's own mean, so that one shot of two classes leaves opposite prototypes. Classes are those
    of the training rows; `ways` of them are drawn for each episode, all by default.

    Raises:
        UserError: a class with fewer training rows than shots, or fewer classes than ways.
    """
    rows_of = [np.flatnonzero(train_y == c) for c in np.unique(train_y)]
    names = np.unique(train_y)
    fewest = min(range(len(names)), key=lambda i: len(rows_of[i]))
    if len(rows_of[fewest]) < shots or len(names) < (ways or 2):
        raise UserError(
            f"{shots} shots of {ways or len(names)} classes asked for; of {len(names)} classes, one has "
            f"{len(rows_of[fewest])} training rows",
            "Lower shots or ways",
        )
    rng = np.random.default_rng([seed, 9, shots])
    centre = train_x.mean(0)  # nothing but precision: distances below are differences of squares
    x, q = (np.asarray(part - centre, np.float64) for part in (train_x, test_x))
    squares = (q * q).sum(1)
    found = []
    for start in range(0, number, CHUNK):
        count = min(CHUNK, number - start)
        chosen = np.stack([rng.permutation(len(names))[: ways or len(names)] for _ in range(count)])
        support = np.stack(
            [[rng.choice(rows_of[c], shots, replace=False) for c in classes] for classes in chosen]
        )
        source = x[support]  # (e, c, shots, d)
        mean = source.mean((1, 2))
        proto = _unit(source - mean[:, None, None]).mean(2)
        # cos-like score of the centred query, without forming it for every episode
        along = np.einsum("md,ed->em", q, mean)
        length = np.sqrt(np.maximum(squares - 2 * along + (mean**2).sum(1)[:, None], 1e-24))
        dot = np.einsum("ecd,md->ecm", proto, q) - np.einsum("ecd,ed->ec", proto, mean)[..., None]
        score = dot / length[:, None] - (proto**2).sum(-1)[..., None] / 2  # nearest: greatest
        for classes, guess in zip(chosen, score.argmax(1), strict=True):
            hit = names[classes][guess] == test_y
            recalls = [hit[test_y == c].mean() for c in names[classes] if (test_y == c).any()]
            found.append(np.mean(recalls))
    return np.array(found)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
