"""Attention-based MIL."""

from __future__ import annotations

from flax import linen as nn

from pathme_jax.mil.heads.common import (
    Bag,
    Out,
    attention_scores,
    embedded,
    masked_softmax,
    single,
)


class ABMIL(nn.Module):
    """Attention-based MIL (Ilse, Tomczak & Welling 2018, eq. 7 to 9), plain, gated and with several heads.

        h_i = dropout(relu(x_i W + b)), once per layer of the embedding
        s_i = w · tanh(V h_i), or gated w · (tanh(V h_i) ⊙ σ(U h_i));      a = softmax(s)
        logits = (Σ a_i h_i) C + c

    The paper's network for MUSK and the animals is `embed=(256, 128, 64), attention=64`.

    Differences from the paper: V and U have biases, as in the authors' code. The paper has one head; with
    more, heads share V and U, have a w each, and the classifier sees their embeddings side by side.

    Attributes:
        outputs: number of logits.
        embed: sizes of the embedding's layers.
        attention: width of V and U.
        gated: multiply tanh by a sigmoid gate.
        heads: rows of attention.
        dropout: of the embedding, in training.
    """

    outputs: int
    embed: tuple[int, ...] = (512,)
    attention: int = 128
    gated: bool = True
    heads: int = 1
    dropout: float = 0.25

    @nn.compact
    def __call__(self, bag: Bag, train: bool = False) -> Out:
        h = embedded(bag.features, self.embed, self.dropout, train)
        scores = attention_scores(h, self.attention, self.heads, self.gated)
        attention = masked_softmax(scores, bag.mask)
        slide = (attention @ h).reshape(-1)
        return single(nn.Dense(self.outputs, name="classify")(slide), attention)
