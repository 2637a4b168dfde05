"""Mean and max pooling: what a head with attention has to beat."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from pathme_jax.mil.heads.common import Bag, Out, embedded, masked_max, single


class MeanPool(nn.Module):
    """The classifier of the mean instance: `logits = (1/n Σ h_i) W + b`.

    Attributes:
        outputs: number of logits.
        embed: sizes of the embedding's layers; () classifies the mean feature itself, a linear probe.
        dropout: of the embedding, in training.
    """

    outputs: int
    embed: tuple[int, ...] = (512,)
    dropout: float = 0.25

    @nn.compact
    def __call__(self, bag: Bag, train: bool = False) -> Out:
        h = embedded(bag.features, self.embed, self.dropout, train)
        attention = bag.mask / jnp.maximum(bag.mask.sum(), 1)
        return single(nn.Dense(self.outputs, name="classify")(attention @ h), attention[None])


class MaxPool(nn.Module):
    """The classifier of the largest value of each feature: `logits = (max_i h_i) W + b`.

    This is max pooling of embeddings (Ilse et al. 2018, §2.2), not of instance scores, which is the first
    stream of `DSMIL`. The attention of an instance is the share of features whose largest value it has;
    instances that tie share a feature.

    Attributes: as of `MeanPool`.
    """

    outputs: int
    embed: tuple[int, ...] = (512,)
    dropout: float = 0.25

    @nn.compact
    def __call__(self, bag: Bag, train: bool = False) -> Out:
        h = embedded(bag.features, self.embed, self.dropout, train)
        top = masked_max(h, bag.mask)
        logits = nn.Dense(self.outputs, name="classify")(top)
        return single(logits, _shares(h, top, bag.mask)[None])


def _shares(h: Array, top: Array, mask: Array) -> Array:
    """(m,) share of the columns of h (m, h) in which an instance attains `top` (h,)."""
    attains = (mask[:, None] & (h == top)).astype(jnp.float32)
    return (attains / jnp.maximum(attains.sum(0), 1)).mean(1)
