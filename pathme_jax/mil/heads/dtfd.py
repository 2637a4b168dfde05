"""DTFD-MIL: pseudo-bags, and a second tier that judges what they distil (Zhang et al. 2022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from pathme_jax.errors import UserError
from pathme_jax.mil.heads.common import Bag, Out, attention_scores, embedded, masked_softmax

DISTILL = ("MaxMinS", "MaxS", "AFS")


class DTFD(nn.Module):
    """Gated attention on pseudo-bags, and again on the features distilled from them (Zhang et al. 2022, eq. 8–14).

        tier 1, pseudo-bag g:  z_g = Σ_{i∈g} a_i h_i;   y_g = C₁ z_g;   score of an instance s_i = C₁ a_i h_i
        tier 2:                logits = C₂ Σ_j b_j f_j over the distilled features f
        loss:                  0.7 · tier 2 + 0.3 · mean over the pseudo-bags of tier 1

    f are, of every pseudo-bag, the instances of the highest and lowest probability (MaxMinS), of the highest (MaxS),
    or z_g (AFS). In training the split is random (rng "split"); else instance r of the slide goes to pseudo-bag
    r mod `groups`, so that an answer does not depend on chance, but does on the order of the instances.

    Cost: O(m); for any bag that fits in memory.

    Differences from the paper and its code:
        The probability an instance is chosen by is of the last class, as in the code, for two classes. With one
        output it is the output, with more than two classes that of the pseudo-bag's own most probable class: the
        paper has two classes only.
        The paper optimises the tiers apart, tier 1 with a gradient of its own; here one loss trains both.
        The embedding has a bias and dropout, and no residual blocks (their number is zero in the code's default).

    `attention`, (1, m): tier 1's within each pseudo-bag times the weight tier 2 gives to what was distilled from it.
    With AFS that is the exact weight of h_i in the slide's feature.

    Attributes:
        outputs: o.
        hidden: width of the embedding.
        attention: width of the attention branches.
        groups: pseudo-bags; fewer where there are fewer instances.
        distill: "MaxMinS", "MaxS" or "AFS".
        keep: instances taken at each end of a pseudo-bag.
        dropout: of the embedding.
    """

    outputs: int
    hidden: int = 512
    attention: int = 128
    groups: int = 8
    distill: str = "MaxMinS"
    keep: int = 1
    dropout: float = 0.25

    @nn.compact
    def __call__(self, bag: Bag, train: bool = False) -> Out:
        if self.distill not in DISTILL:
            raise UserError(f"distill is {self.distill!r}", f"Expected {', '.join(DISTILL)}")
        h = embedded(bag.features, (self.hidden,), self.dropout, train)
        member = self._split(bag.mask, train)
        held = member.any(1)  # False for pseudo-bags without an instance

        scores = _Attention(self.attention, name="attention_1")(h)
        a = masked_softmax(jnp.broadcast_to(scores, member.shape), member)
        classify = nn.Dense(self.outputs, name="classify_1")
        z = a @ h
        tier_1 = classify(z)
        f, taken = z[:, None], held[:, None]
        if self.distill != "AFS":
            weight = classify.variables["params"]["kernel"]
            s = a.max(0)[:, None] * (h @ weight)  # an instance has weight in one pseudo-bag only
            f, taken = self._chosen(h, _probability(s, tier_1), member)

        scores = _Attention(self.attention, name="attention_2")(f.reshape(-1, self.hidden))
        b = masked_softmax(scores, taken.reshape(-1))
        logits = nn.Dense(self.outputs, name="classify")(b @ f.reshape(-1, self.hidden))
        share = held * 0.3 / jnp.maximum(held.sum(), 1)
        streams = ((0.7, logits), *((share[g], tier_1[g]) for g in range(self.groups)))
        return Out(logits, (b.reshape(self.groups, -1).sum(1) @ a)[None], streams, {})

    def _split(self, mask: Array, train: bool) -> Array:
        """(groups, m) bool: the pseudo-bag each instance is in; sizes differ by one at most."""
        if train:
            draws = jax.random.uniform(self.make_rng("split"), mask.shape)
            rank = jnp.argsort(jnp.argsort(jnp.where(mask, draws, 2)))
        else:
            rank = jnp.cumsum(mask) - 1
        return mask & (rank % self.groups == jnp.arange(self.groups)[:, None])

    def _chosen(self, h: Array, probability: Array, member: Array) -> tuple[Array, Array]:
        """Features (groups, k, hidden) of the chosen instances, and (groups, k) which of them exist."""
        keep = min(self.keep, len(h))
        ends = (1, -1) if self.distill == "MaxMinS" else (1,)
        found = [jax.lax.top_k(jnp.where(member, e * probability, -jnp.inf), keep) for e in ends]
        values, index = (jnp.concatenate(each, 1) for each in zip(*found, strict=True))
        return h[index], values > -jnp.inf


class _Attention(nn.Module):
    """(m, h) → (m,) gated scores"""

    width: int

    @nn.compact
    def __call__(self, h: Array) -> Array:
        return attention_scores(h, self.width, rows=1, gated=True)[0]


def _probability(s: Array, tier_1: Array) -> Array:
    """(m, o) scores of instances, (groups, o) logits → (groups, m), by which the instances of each are ranked."""
    groups, outputs = tier_1.shape
    if outputs == 1:
        return jnp.broadcast_to(s[:, 0], (groups, len(s)))
    probability = nn.softmax(s)
    if outputs == 2:
        return jnp.broadcast_to(probability[:, 1], (groups, len(s)))
    return probability.T[tier_1.argmax(1)]
