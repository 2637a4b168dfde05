"""Fits a whole population of heads (folds × controls) as one compiled program.

The members share the bags, their order and the dropout masks, and differ in labels, in the weight of each bag and
in the standardisation of their training fold. A held-out bag has weight zero. Member i of a population is the
member trained alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from pathme_jax.mil.bags import Bucket, pack
from pathme_jax.mil.folds import TRAIN, VALIDATION
from pathme_jax.mil.heads import ABMIL, absorb
from pathme_jax.mil.settings import Settings


@dataclasses.dataclass
class Members:
    """What the p members differ in, over n bags.

    Attributes:
        parts: (p, n) UNUSED, TRAIN, VALIDATION or TEST.
        labels: (p, n) class index.
        weights: (p, n) weight of each bag in the loss where it is trained on; see `bag_weights`.
    """

    parts: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass
class Population:
    """Fitted members.

    Attributes:
        params: tree of (p, ...) arrays: heads that take raw features.
        history: (p, epochs, 2) training and validation loss, the latter NaN without a validation part.
    """

    head: ABMIL
    params: Any
    history: np.ndarray


def bag_weights(parts: np.ndarray, labels: np.ndarray, cases: list[str]) -> np.ndarray:
    """(n,) weights of one member's bags: 0 off the training part, else every class weighs the same in sum, and
    every case of a class, however many slides it has; their mean over the training bags is 1."""
    weights = np.zeros(len(cases))
    train = np.flatnonzero(parts == TRAIN)
    for label in np.unique(labels[train]):
        rows = [i for i in train if labels[i] == label]
        slides = np.array([sum(cases[j] == cases[i] for j in rows) for i in rows])
        weights[rows] = 1 / slides / np.sum(1 / slides)
    return weights * len(train) / max(weights.sum(), 1e-12)


def fit(
    bags: list[np.ndarray], members: Members, classes: int, settings: Settings, name: str = "mil"
) -> Population:
    """Trains all members on bags of (m, d) features; AdamW, cosine decay, a fixed number of epochs.

    A member with a validation part keeps the parameters of the epoch of least validation loss, others the last.
    """
    head = ABMIL(classes, settings.hidden, settings.attention, settings.dropout)
    buckets = pack(bags, settings.max_instances, settings.seed)
    mean, std = _standardisation(bags, members.parts)
    key = jax.random.key(settings.seed)
    state = _init(head, *mean.shape, key)
    best, least = state["params"], np.full(len(mean), np.inf)
    validated = (members.parts == VALIDATION).any(1)
    steps = sum(-(-len(bucket.index) // settings.batch) for bucket in buckets)
    history = np.full((len(mean), settings.epochs, 2), np.nan)
    step = 0
    for epoch in tqdm(range(settings.epochs), desc=name, unit="epoch", leave=False):
        total = jnp.zeros(len(mean))
        for bucket, rows in _batches(buckets, settings, epoch):
            real = np.arange(settings.batch) < len(rows)
            rows = np.resize(rows, settings.batch)
            index = bucket.index[rows]
            decay = (1 + math.cos(math.pi * step / (steps * settings.epochs))) / 2
            state, loss = _step(
                head,
                settings.weight_decay,
                state,
                (bucket.features[rows], bucket.mask[rows]),
                members.labels[:, index],
                (members.weights[:, index] * real).astype(np.float32),
                (mean, std),
                (key, step),
                settings.learning_rate * decay,
            )
            total += loss
            step += 1
        history[:, epoch, 0] = np.asarray(total) / members.weights.sum(1)
        if validated.any():
            raw = _absorb(state["params"], mean, std)
            history[:, epoch, 1] = _validation_loss(
                Population(head, raw, history), buckets, members
            )
            better = ~validated | (history[:, epoch, 1] < least)
            least = np.where(better, history[:, epoch, 1], least)
            best = _select(better, state["params"], best)
        else:
            best = state["params"]
    return Population(head, _absorb(best, mean, std), history)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init(head: ABMIL, members: int, width: int, key: jax.Array) -> dict[str, Any]:
    """Members start alike, so that what tells them apart is what they are trained on."""
    params = head.init(key, jnp.zeros((1, width)), jnp.ones((1,), bool))["params"]
    params = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], members, 0), params)
    return {"params": params, "moments": jax.vmap(optax.scale_by_adam().init)(params)}


_absorb = jax.jit(jax.vmap(absorb))


def _standardisation(bags: list[np.ndarray], parts: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(p, d) mean and standard deviation over the instances of each member's training bags."""
    train = (parts == TRAIN).astype(np.float64)
    count = train @ np.array([len(bag) for bag in bags])[:, None]
    mean = train @ np.array([bag.sum(0, dtype=np.float64) for bag in bags]) / count
    square = train @ np.array([np.square(bag, dtype=np.float64).sum(0) for bag in bags]) / count
    std = np.sqrt(np.maximum(square - mean**2, 0))
    std[std <= 1e-4 * np.abs(mean) + 1e-8] = 1  # a constant feature must not be blown up
    return jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)


def _batches(
    buckets: list[Bucket], settings: Settings, epoch: int
) -> list[tuple[Bucket, np.ndarray]]:
    """One epoch's batches: rows of one bucket each, shuffled within and across buckets."""
    rng = np.random.default_rng([settings.seed, 4, epoch])
    batches = []
    for bucket in buckets:
        order = rng.permutation(len(bucket.index))
        batches += [
            (bucket, order[i : i + settings.batch]) for i in range(0, len(order), settings.batch)
        ]
    return [batches[i] for i in rng.permutation(len(batches))]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(head, weight_decay, state, x, labels, weights, standardisation, stream, rate):
    """One step of all members on one batch; returns (state, (p,) summed weighted loss)."""

    key = jax.random.fold_in(*stream)

    def loss_of(params, labels, weights, mean, std):
        # The key is not mapped over: one dropout mask for all members, drawn once.
        logits, _ = head.apply(
            {"params": absorb(params, mean, std)}, *x, train=True, rngs={"dropout": key}
        )
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        total = (each * weights).sum()
        return total / len(weights), total

    def update(state, labels, weights, mean, std):
        gradient, total = jax.grad(loss_of, has_aux=True)(
            state["params"], labels, weights, mean, std
        )
        direction, moments = optax.scale_by_adam().update(gradient, state["moments"])
        params = jax.tree.map(
            lambda p, u: p - rate * (u + weight_decay * p), state["params"], direction
        )
        # A batch without a training bag must not move the member.
        seen = weights.sum() > 0
        new = {"params": params, "moments": moments}
        return jax.tree.map(lambda a, b: jnp.where(seen, a, b), new, state), total

    return jax.vmap(update)(state, labels, weights, *standardisation)


@jax.jit
def _select(better: jax.typing.ArrayLike, new: Any, old: Any) -> Any:
    return jax.tree.map(
        lambda a, b: jnp.where(jnp.reshape(better, (-1, *[1] * (a.ndim - 1))), a, b), new, old
    )


def _validation_loss(population: Population, buckets: list[Bucket], members: Members) -> np.ndarray:
    """(p,) mean over the classes of a member's validation part of its mean cross-entropy."""
    pairs = np.argwhere(members.parts == VALIDATION)
    logits, _ = _predict(population, buckets, pairs)
    labels = members.labels[pairs[:, 0], pairs[:, 1]]
    each = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)))
    losses = np.full(len(members.parts), np.nan)
    for member in np.unique(pairs[:, 0]):
        mine = pairs[:, 0] == member
        losses[member] = np.mean(
            [each[mine & (labels == c)].mean() for c in np.unique(labels[mine])]
        )
    return losses


def predict(
    population: Population, bags: list[np.ndarray], pairs: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Scores of given members on given bags, all instances used.

    Args:
        pairs: (q, 2) member and bag.

    Returns:
        (q, c) class probabilities, and q attention vectors (m,), each summing to one.
    """
    logits, attention = _predict(population, pack(bags), pairs)
    lengths = [len(bags[bag]) for bag in pairs[:, 1]]
    return (
        np.asarray(jax.nn.softmax(logits, axis=-1)),
        [a[:length] for a, length in zip(attention, lengths, strict=True)],
    )


def _predict(
    population: Population, buckets: list[Bucket], pairs: np.ndarray, batch: int = 4
) -> tuple[np.ndarray, list[np.ndarray]]:
    logits = np.zeros((len(pairs), population.head.classes), np.float32)
    attention: list[np.ndarray] = [np.empty(0)] * len(pairs)
    for bucket in buckets:
        row_of = {bag: row for row, bag in enumerate(bucket.index.tolist())}
        here = np.flatnonzero(np.isin(pairs[:, 1], bucket.index))
        for start in range(0, len(here), batch):
            which = here[start : start + batch]
            member, bag = np.resize(pairs[which], (batch, 2)).T  # repeats fill up the last batch
            rows = [row_of[b] for b in bag.tolist()]
            out, weights = _forward(
                population.head, population.params, member, bucket.features[rows], bucket.mask[rows]
            )
            logits[which] = np.asarray(out)[: len(which)]
            for i, a in zip(which, np.asarray(weights), strict=False):
                attention[i] = a
    return logits, attention


@functools.partial(jax.jit, static_argnums=0)
def _forward(head, params, member, features, mask):
    """Bag i by member[i]: logits (b, c), attention (b, m)."""

    def one(member, features, mask):
        mine = jax.tree.map(lambda leaf: leaf[member], params)
        return head.apply({"params": mine}, features, mask)

    return jax.vmap(one)(member, features, mask)
