"""R²T-MIL: instances re-embedded by attention within and across regions, then pooled (Tang et al. 2024)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from pathme_jax.mil.heads.common import (
    Bag,
    Out,
    attention_scores,
    embedded,
    masked_softmax,
    single,
)
from pathme_jax.mil.heads.square import SequenceConv, largest_side, packed, side_of

SCORES = 2**26  # attention scores held at once


class RRT(nn.Module):
    """Regional and cross-region attention in front of attention pooling (Tang et al. 2024, eq. 4–9).

        regions: the instances row by row in a square, cut into `regions` × `regions`
        R-MSA:   x ← x + MSA(LN x) within each region, scores softmax(S + EPEG(S)), S = q kᵀ / √w
        CR-MSA:  k representatives of each region, Σ_t softmax_t(y φ)_t y_t with y = LN x, attend across regions, and
                 go back to the instances weighted by softmax_k(y φ) · minmax_t(y φ)
        logits = C · ABMIL(LN x)

    EPEG convolves S along its queries. That is linear, so that S + EPEG(S) = (q + conv(q)) kᵀ / √w: here the
    queries are convolved and the cost of EPEG does not grow with the size of S. Its bias adds one number to a row of
    scores, which the softmax does not see, so that it is left out.

    The regions depend on the number of instances, not on the size they are padded to. Depends on the order of
    instances, by design. Square and regions follow that order and not the slide's grid, as in the paper.

    Cost: O(m² / regions²) in time; in memory O(m), and the scores of as many regions as stay below `SCORES`, or of
    one. Meant for bags up to about 200,000 instances on an accelerator; more regions are faster, as the authors
    advise for long sequences. With no more than regions² instances each region holds one, and CR-MSA adds nothing.

    Differences from the paper and its code:
        Places without an instance take no part. In the code they hold zeros that act as tokens.
        The pooling is gated attention with tanh; the code's default is ReLU without a gate.
        Representatives come from φ as one matrix, without the MLP variant; no feed-forward layers, as in the paper.

    `attention`, (1, m): of the pooling.

    Attributes:
        outputs: o.
        hidden: width of the embedding.
        attention: width of the pooling's branches.
        regions: a side.
        epeg: width of the convolution; the paper takes 9 to 21.
        representatives: k of each region; the paper takes 1 to 5.
        dropout: of the embedding.
        attention_dropout: behind both attention layers.
    """

    outputs: int
    hidden: int = 512
    heads: int = 8
    attention: int = 128
    regions: int = 8
    epeg: int = 15
    representatives: int = 3
    dropout: float = 0.25
    attention_dropout: float = 0.1

    @nn.compact
    def __call__(self, bag: Bag, train: bool = False) -> Out:
        x = embedded(bag.features, (self.hidden,), self.dropout, train)
        drop = nn.Dropout(self.attention_dropout, deterministic=not train)
        rows, real, place = layout(bag.mask, self.regions)

        def by_region(attend: nn.Module, norm: str) -> Array:
            y = nn.LayerNorm(1e-5, name=norm)(x)
            y = attend(jnp.where(real[..., None], y[rows], 0), real)
            return drop(y.reshape(-1, self.hidden)[place])

        x = x + by_region(_Within(self.heads, self.epeg, name="within"), "norm_within")
        x = x + by_region(_Across(self.heads, self.representatives, name="across"), "norm_across")

        x = nn.LayerNorm(1e-5, name="norm")(x)
        scores = attention_scores(x, self.attention, rows=1, gated=True)
        a = masked_softmax(scores, bag.mask)
        return single(nn.Dense(self.outputs, name="classify")((a @ x)[0]), a)


def layout(mask: Array, regions: int) -> tuple[Array, Array, Array]:
    """Where the instances go: row by row into a square, and that into regions.

    Returns:
        rows: (r, t) row in the bag of each place of each of the r = regions² regions, zero where there is none.
        real: (r, t) bool, True where there is an instance.
        place: (m,) region · t + position in it of each instance, zero for padding.
    """
    instances, count = packed(mask)
    edge = -(-side_of(count) // regions)  # of a region, for this bag
    size = (-(-largest_side(len(mask)) // regions)) ** 2  # of a region, at most
    side = edge * regions

    region, position = jnp.arange(regions**2)[:, None], jnp.arange(size)[None]
    row = region // regions * edge + position // edge
    column = region % regions * edge + position % edge
    rank = row * side + column
    real = (position < edge * edge) & (rank < mask.sum())

    rank_of = jnp.cumsum(mask) - 1
    row, column = rank_of // side, rank_of % side
    place = (row // edge * regions + column // edge) * size + row % edge * edge + column % edge
    return instances[jnp.where(real, rank, 0)], real, jnp.where(mask, place, 0)


def _split(x: Array, heads: int) -> tuple[Array, Array, Array]:
    """(b, t, 3 c) → queries, scaled, keys and values, each (b, heads, t, w)"""
    q, k, v = x.reshape(*x.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)
    return q * q.shape[-1] ** -0.5, k, v


class _Within(nn.Module):
    """R-MSA with EPEG: (r, t, c) tokens, zero where not real (r, t) → (r, t, c)"""

    heads: int
    epeg: int

    @nn.compact
    def __call__(self, y: Array, real: Array) -> Array:
        regions, size, width = y.shape
        q, k, v = _split(nn.Dense(3 * width, name="qkv")(y), self.heads)
        q = jnp.where(real[:, None, :, None], q, 0)  # as beyond the ends of the sequence
        q = q + SequenceConv(self.epeg, name="epeg")(q)

        @jax.checkpoint
        def attend(given: tuple[Array, Array, Array, Array]) -> Array:
            q, k, v, real = given
            return masked_softmax(q @ k.mT, real) @ v

        at_once = max(1, min(regions, SCORES // (self.heads * size**2)))
        out = jax.lax.map(attend, (q, k, v, real), batch_size=at_once)
        return nn.Dense(width, name="out")(out.transpose(0, 2, 1, 3).reshape(y.shape))


class _Across(nn.Module):
    """CR-MSA: (r, t, c) tokens, zero where not real (r, t) → (r, t, c)"""

    heads: int
    representatives: int

    @nn.compact
    def __call__(self, y: Array, real: Array) -> Array:
        phi = nn.Dense(self.representatives, use_bias=False, name="phi")
        logits = phi(y).mT  # (r, k, t)
        real = real[:, None]
        chosen = masked_softmax(logits, real) @ y

        low = jnp.min(jnp.where(real, logits, jnp.inf), -1, keepdims=True)
        high = jnp.max(jnp.where(real, logits, -jnp.inf), -1, keepdims=True)
        spread = jnp.where(high - low > 1e-6, high - low, 1)
        scaled = jnp.where(real, logits - jnp.where(jnp.isfinite(low), low, 0), 0) / spread

        held = real.any(-1)[:, 0]  # regions with an instance
        q, k, v = _split(nn.Dense(3 * y.shape[-1], name="qkv")(chosen.swapaxes(0, 1)), self.heads)
        out = masked_softmax(q @ k.mT, held) @ v  # (k, heads, r, w)
        out = out.transpose(2, 0, 1, 3).reshape(chosen.shape)
        out = nn.Dense(y.shape[-1], name="out")(out)
        return jnp.einsum("rkt,rkc->rtc", nn.softmax(logits, 1) * scaled, out)
