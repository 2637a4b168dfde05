"""A planted task that needs more than the mean of a bag, and how well a head learns it.

Classes share the mean of their bags: what differs is which kinds of instance meet, or where. So a linear classifier on the
mean is at chance, which `of_mean` measures.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from pathme_jax.mil.heads.common import Bag

WIDTH = 8


def conjunction(bags: int, side: int, seed: int) -> tuple[Bag, np.ndarray]:
    """Positive bags hold one instance of kind A and one of kind B; negative ones two of A, or two of B."""
    rng = np.random.default_rng(seed)
    labels = np.arange(bags) % 2
    kinds = np.where(labels[:, None], [0, 1], rng.integers(2, size=(bags, 1)))
    places = np.stack([rng.permutation(side * side)[:2] for _ in range(bags)])
    return _bags(rng, side, places, kinds), labels


def clustered(bags: int, side: int, seed: int) -> tuple[Bag, np.ndarray]:
    """Every bag holds four instances of kind A: in one 2 × 2 block of the grid where positive, else in four blocks."""
    rng = np.random.default_rng(seed)
    labels = np.arange(bags) % 2
    corner = np.add.outer(np.arange(0, side, 2) * side, np.arange(0, side, 2)).ravel()
    block = corner[:, None] + [0, 1, side, side + 1]  # (blocks, 4) places
    places = np.zeros((bags, 4), int)
    for i, together in enumerate(labels):
        chosen = rng.permutation(len(block))[:4]
        places[i] = block[chosen[0]] if together else block[chosen, rng.integers(4, size=4)]
    return _bags(rng, side, places, np.zeros((bags, 4), int)), labels


def _bags(rng: np.random.Generator, side: int, places: np.ndarray, kinds: np.ndarray) -> Bag:
    """Noise on a full grid, with the planted instances at their places."""
    features = 0.05 * rng.normal(size=(len(places), side * side, WIDTH))
    for i, (place, kind) in enumerate(zip(places, kinds, strict=True)):
        features[i, place] += 3 * np.eye(WIDTH)[kind]
    cells = np.stack(np.divmod(np.arange(side * side), side), 1).astype(np.int32)
    return Bag(
        jnp.asarray(features, jnp.float32),
        jnp.ones(features.shape[:2], bool),
        jnp.asarray(np.broadcast_to(cells, (len(places), *cells.shape))),
    )


def of_mean(train: tuple[Bag, np.ndarray], test: tuple[Bag, np.ndarray]) -> float:
    """AUROC of logistic regression on the bags' means."""
    means = [np.asarray(bags.features).mean(1) for bags, _ in (train, test)]
    fitted = LogisticRegression().fit(means[0], train[1])
    return float(roc_auc_score(test[1], fitted.decision_function(means[1])))


def of_head(
    head: Any,
    train: tuple[Bag, np.ndarray],
    test: tuple[Bag, np.ndarray],
    steps: int = 60,
    rate: float = 5e-3,
) -> float:
    """AUROC on `test` of a head with one output after full-batch Adam steps on `train`, without dropout."""
    (bags, labels), (held_out, truth) = train, test
    params = jax.jit(head.init)(jax.random.key(0), jax.tree.map(lambda x: x[0], bags))["params"]
    optimiser = optax.adam(rate)

    def answer(params: Any, bags: Bag) -> jax.Array:
        return jax.vmap(lambda bag: head.apply({"params": params}, bag).logits[0])(bags)

    def loss(params: Any) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(answer(params, bags), labels).mean()

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    fit = jax.jit(lambda p: jax.lax.scan(step, (p, optimiser.init(p)), None, steps)[0][0])
    return float(roc_auc_score(truth, jax.jit(answer)(fit(params), held_out)))
