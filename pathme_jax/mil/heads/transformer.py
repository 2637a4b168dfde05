"""A transformer over instances that knows how far apart they lie on the slide (2-D ALiBi), exact at any bag size."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from pathme_jax.mil.heads.common import Bag, Out, masked_softmax, single

LOWEST = -1e30  # below any score, and finite, so that no difference of two is NaN


class Transformer(nn.Module):
    """Pre-norm transformer with a CLS token and distances as attention biases (Press et al. 2022; TITAN 2025).

        score_h(i, j) = q_i · k_j / √w − slope_h · ‖cell_i − cell_j‖₂;   logits = C · LN(x)[CLS]

    Distances are in tiles; CLS is at distance zero of all. Where cells are unknown (zero) the biases vanish.
    The slopes are those of Press et al.; a head with a steep one sees its neighbours only.

    The last layer is computed for CLS alone, since nothing else of it is read. In the layers before, attention goes
    block by block with a running softmax, so that memory grows with m · block and not with m²; time is
    O(depth · m²). Meant for bags up to 200,000 instances on an accelerator (22 GiB for the gradient by XLA's count),
    and a few thousand on a CPU.

    Differences from TITAN's slide encoder: two layers of 512 by default, trained from scratch; no layer scale;
    instances only, where TITAN has a full grid with a mask for its background.

    `attention`, (heads, m): of CLS in the last layer, its weight on itself left out.

    Attributes:
        outputs: o.
        hidden: width of the tokens.
        depth: layers.
        mlp: width of the feed-forward layer over `hidden`.
        dropout: of each residual branch.
        block: instances in a block of queries, and of keys, at most.
    """

    outputs: int
    hidden: int = 512
    depth: int = 2
    heads: int = 8
    mlp: float = 4.0
    dropout: float = 0.1
    block: int = 1024

    @nn.compact
    def __call__(self, bag: Bag, train: bool = False) -> Out:
        h = nn.gelu(nn.Dense(self.hidden, name="embed")(bag.features), approximate=False)
        cls = self.param("cls", nn.initializers.normal(0.02), (1, self.hidden))
        x = jnp.concatenate([cls, h])
        # Row, column, and one where these mean something.
        places = jnp.pad(bag.cells.astype(jnp.float32), ((0, 0), (0, 1)), constant_values=1)
        places = jnp.concatenate([jnp.zeros((1, 3)), places])
        mask = jnp.append(True, bag.mask)
        layer = functools.partial(
            _Layer, heads=self.heads, mlp=self.mlp, dropout=self.dropout, block=self.block
        )
        for i in range(self.depth - 1):
            x, _ = layer(name=f"layer_{i}")(x, x, places, mask, train)
        x, scores = layer(name=f"layer_{self.depth - 1}")(x[:1], x, places, mask, train)
        assert scores is not None
        logits = nn.Dense(self.outputs, name="classify")(nn.LayerNorm(1e-5, name="norm")(x[0]))
        return single(logits, masked_softmax(scores[:, 0, 1:], bag.mask))


class _Layer(nn.Module):
    """Pre-norm attention and feed-forward layer, each added to its input."""

    heads: int
    mlp: float
    dropout: float
    block: int

    @nn.compact
    def __call__(
        self, x: Array, keys: Array, places: Array, mask: Array, train: bool
    ) -> tuple[Array, Array | None]:
        """Tokens x (1, c), the first of keys, or all of them, (t, c) → as x; and the scores of the first, or None."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        width = x.shape[-1]
        norm = nn.LayerNorm(1e-5, name="norm_attention")

        def split(name: str, tokens: Array) -> Array:
            projected = nn.Dense(width, name=name)(norm(tokens))
            return projected.reshape(len(tokens), self.heads, -1).transpose(1, 0, 2)

        q, k, v = split("query", x), split("key", keys), split("value", keys)
        q, scores = q * q.shape[-1] ** -0.5, None
        if len(x) == 1:
            scores = scores_of(q, k, places[:1], places)
            attended = masked_softmax(scores, mask) @ v
        else:
            attended = blockwise(q, k, v, places, mask, self.block)
        attended = attended.transpose(1, 0, 2).reshape(x.shape)
        x = x + drop(nn.Dense(width, name="out")(attended))

        y = nn.Dense(round(self.mlp * width), name="up")(nn.LayerNorm(1e-5, name="norm_mlp")(x))
        y = drop(nn.gelu(y, approximate=False))
        return x + drop(nn.Dense(width, name="down")(y)), scores


def slopes(heads: int) -> np.ndarray:
    """(heads,) 2^(-8 i / heads), i = 1 …; where heads is no power of two, those of the power below, then every
    other of the power above (Press et al. 2022)."""
    below = 2 ** int(np.log2(heads))
    first = 2.0 ** (-8 * np.arange(1, below + 1) / below)
    if below == heads:
        return first.astype(np.float32)
    return np.concatenate([first, slopes(2 * below)[::2][: heads - below]]).astype(np.float32)


def scores_of(q: Array, k: Array, from_places: Array, to_places: Array) -> Array:
    """q (heads, i, w), scaled, and k (heads, j, w) → (heads, i, j) scores with their distance biases.

    Args:
        from_places: (i, 3) row, column and one; zeros for a token without a place.
        to_places: (j, 3) likewise.
    """
    step = from_places[:, None] - to_places[None]
    placed = from_places[:, None, 2] * to_places[None, :, 2]
    distance = jnp.sqrt(step[..., 0] ** 2 + step[..., 1] ** 2) * placed
    bias = jnp.asarray(slopes(len(q)))[:, None, None] * distance
    return jnp.einsum("hid,hjd->hij", q, k) - bias


def blockwise(q: Array, k: Array, v: Array, places: Array, mask: Array, block: int) -> Array:
    """Attention of all tokens to all, (heads, t, w), without the (t, t) matrix; exact.

    Queries are mapped over in blocks, and for each the blocks of keys are scanned with a running maximum, sum of
    weights and weighted sum. The gradient computes the blocks again instead of storing them.
    """
    tokens = q.shape[1]
    blocks = -(-tokens // block)
    if blocks == 1:
        return masked_softmax(scores_of(q, k, places, places), mask) @ v
    size = -(-tokens // blocks)

    def cut(x: Array) -> Array:
        """(heads, t, w) or (t, w) → blocks first"""
        widths = [(0, 0)] * (x.ndim - 2) + [(0, blocks * size - tokens), (0, 0)]
        x = jnp.pad(x, widths)
        return jnp.moveaxis(x.reshape(*x.shape[:-2], blocks, size, x.shape[-1]), -3, 0)

    keys = (cut(k), cut(v), cut(places), cut(mask[:, None])[..., 0])

    @jax.checkpoint
    def rows(given: tuple[Array, Array]) -> Array:
        q, at = given

        @jax.checkpoint
        def step(carry, each):
            top, total, weighted = carry
            k, v, places, real = each
            scores = jnp.where(real, scores_of(q, k, at, places), LOWEST)
            higher = jnp.maximum(top, jax.lax.stop_gradient(scores.max(-1)))
            weights = jnp.where(real, jnp.exp(scores - higher[..., None]), 0)
            shrink = jnp.exp(top - higher)
            total = total * shrink + weights.sum(-1)
            weighted = weighted * shrink[..., None] + weights @ v
            return (higher, total, weighted), None

        start = (jnp.full(q.shape[:2], LOWEST), jnp.zeros(q.shape[:2]), jnp.zeros(q.shape))
        (_, total, weighted), _ = jax.lax.scan(step, start, keys)
        return weighted / total[..., None]  # CLS is always there, so that no sum is zero

    found = jax.lax.map(rows, (cut(q), keys[2]))
    return jnp.moveaxis(found, 0, 1).reshape(len(q), blocks * size, -1)[:, :tokens]
