"""ILRA-MIL: self-attention through a few learned latents, and a learned query that pools (Xiang & Zhang 2023)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from pathme_jax.mil.heads.common import Bag, Out, embedded, masked_softmax, single


class ILRA(nn.Module):
    """Gated attention blocks of low rank, then non-local pooling (Xiang & Zhang 2023, eq. 12–17).

        M(Q, K) = LN(o + relu(W o)),  o = LN(W_q Q + MHA(W_q Q, W_k K, W_v K)),  gated: ⊙ silu(W_g Q)
        block:   x ← M(x, M(L, x)), both gated, L (rank, hidden) learned
        pooling: logits = C · M(S, x), S (1, hidden) learned

    Cost: O(m · rank) in time and memory; for bags up to about 200,000 instances.

    Differences from the paper and its code:
        A layer "embed" of width `hidden` with ReLU comes first, where the first block of the code projects the raw
        features four times.
        The code's attention projects queries, keys and values twice with nothing between, here once.
        The contrastive pre-training of the paper's feature extractor is not part of the head.
        Dropout on the embedding; the code has none.

    `attention`, (heads, m): of S over the instances as the blocks left them.

    Attributes:
        outputs: o.
        hidden: width of tokens and latents.
        rank: latents of a block.
        depth: blocks.
        dropout: of the embedding.
    """

    outputs: int
    hidden: int = 256
    rank: int = 64
    depth: int = 2
    heads: int = 8
    dropout: float = 0.25

    @nn.compact
    def __call__(self, bag: Bag, train: bool = False) -> Out:
        x = embedded(bag.features, (self.hidden,), self.dropout, train)
        always = jnp.ones(self.rank, bool)
        init = nn.initializers.xavier_uniform()
        for i in range(self.depth):
            latents = self.param(f"latents_{i}", init, (self.rank, self.hidden))
            latents, _ = _Attend(self.heads, True, name=f"down_{i}")(latents, x, bag.mask)
            x, _ = _Attend(self.heads, True, name=f"up_{i}")(x, latents, always)
        query = self.param("query", init, (1, self.hidden))
        z, attention = _Attend(self.heads, False, name="pool")(query, x, bag.mask)
        return single(nn.Dense(self.outputs, name="classify")(z[0]), attention[:, 0])


class _Attend(nn.Module):
    """M(Q, K) above."""

    heads: int
    gated: bool

    @nn.compact
    def __call__(self, queries: Array, keys: Array, mask: Array) -> tuple[Array, Array]:
        """(i, c), (j, c), (j,) → (i, c), and the weights (heads, i, j)"""
        width = queries.shape[-1]

        def split(x: Array) -> Array:
            return x.reshape(len(x), self.heads, -1).transpose(1, 0, 2)

        projected = nn.Dense(width, name="query")(queries)
        q, k = split(projected), split(nn.Dense(width, name="key")(keys))
        v = split(nn.Dense(width, name="value")(keys))
        scores = jnp.einsum("hid,hjd->hij", q, k) * q.shape[-1] ** -0.5
        weights = masked_softmax(scores, mask)
        attended = (weights @ v).transpose(1, 0, 2).reshape(len(queries), width)
        o = projected + nn.Dense(width, name="out")(attended)
        o = nn.LayerNorm(1e-5, name="norm_attention")(o)
        o = o + nn.relu(nn.Dense(width, name="feed")(o))
        o = nn.LayerNorm(1e-5, name="norm_feed")(o)
        if self.gated:
            o = o * nn.silu(nn.Dense(width, name="gate")(queries))
        return o, weights
