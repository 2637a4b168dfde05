"""DSMIL: the highest scored instance, and a bag embedded by likeness to it."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn

from pathme_jax.mil.heads.common import Bag, Out, embedded, masked_max, masked_softmax


class DSMIL(nn.Module):
    """Dual-stream MIL (Li, Li & Eliceiri 2021, CVPR, eq. 2 to 6).

        first stream:   s_ic = h_i · w_c + b_c,       max_c = max_i s_ic, attained by the critical instance m(c)
        second stream:  q_i = W_q h_i, v_i = W_v h_i,  a_c = softmax_i(q_i · q_m(c) / √width)
                        bag_c = Σ_d (Σ_i a_di v_i) · K_cd + k_c    (the authors' 1-d convolution over classes)
        logits = (max + bag) / 2;   loss = half the task's loss of either stream

    Differences from the paper: an embedding layer first, as in MIL-Lab, since features of foundation models
    are not trained for the task; q and v have biases and the products are divided by √width, as in the
    authors' code; the task's loss, where theirs is binary cross-entropy of each class.

    Attributes:
        outputs: number of logits.
        embed: sizes of the embedding's layers.
        attention: width of q.
        dropout: of the embedding, in training.
    """

    outputs: int
    embed: tuple[int, ...] = (512,)
    attention: int = 128
    dropout: float = 0.25

    per_class = True  # a row of attention for each logit

    @nn.compact
    def __call__(self, bag: Bag, train: bool = False) -> Out:
        h = embedded(bag.features, self.embed, self.dropout, train)
        scores = nn.Dense(self.outputs, name="score")(h)
        critical = jnp.argmax(jnp.where(bag.mask[:, None], scores, -jnp.inf), 0)
        highest = masked_max(scores, bag.mask)

        q = nn.Dense(self.attention, name="query")(h)
        attention = masked_softmax(q[critical] @ q.T / self.attention**0.5, bag.mask)
        # v is linear and a sums to one: Σ a v = W_v Σ a h, a product of one row for each class, not of m.
        embeddings = nn.Dense(h.shape[-1], name="value")(attention @ h)
        pooled = nn.Dense(self.outputs, name="classify")(embeddings.reshape(-1))
        streams = ((0.5, pooled), (0.5, highest))
        return Out((pooled + highest) / 2, attention, streams, {})
