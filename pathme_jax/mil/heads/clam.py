"""CLAM: attention-based MIL whose most and least attended instances are classified as well."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from pathme_jax.errors import UserError
from pathme_jax.mil.heads.common import Bag, Out, attention_scores, embedded, masked_softmax

# Both losses of a two-way classifier are softplus(margin - (z_true - z_other)): the smooth top-1 SVM of
# Berrada et al. 2018 with temperature 1 and margin 1, and cross-entropy, which is the same without a margin.
MARGINS = {"svm": 1.0, "ce": 0.0}


class CLAM_SB(nn.Module):
    """Clustering-constrained attention MIL (Lu et al. 2021, Nature Biomedical Engineering), single branch.

        h_i = dropout(relu(x_i W + b))      a = softmax(w · (tanh(V h_i) ⊙ σ(U h_i)))
        logits = (Σ a_i h_i) C + c
        instance loss: the two-way classifier of the slide's class is to say 1 of the k instances with most
        attention and 0 of the k with least; with `subtyping`, those of the other classes 0 of the k with most,
        and the mean is taken over the classes
        loss = (1 - w) task loss(logits) + w instance loss

    The instance loss trains the embedding and the instance classifiers, not the attention, and asks for a
    class: other tasks leave `extra` alone.

    Differences from the authors' code: of a bag with n < 2k instances n // 2 are taken from either end, where
    theirs fails or calls an instance both 0 and 1; w has no bias, which the softmax would not notice.

    Attributes:
        outputs: number of logits; for `extra`, of classes.
        embed: sizes of the embedding's layers.
        attention: width of V and U: 256 in the paper's small network, 384 in its big one.
        gated: multiply tanh by a sigmoid gate.
        instances: k.
        instance_loss: "svm", as in the paper, or "ce".
        instance_weight: w.
        subtyping: the classes exclude one another, so that what speaks for one speaks against the others.
        dropout: of the embedding and of the branches of the attention, in training.
        per_class: a row of attention for each class; see `CLAM_MB`.
    """

    outputs: int
    embed: tuple[int, ...] = (512,)
    attention: int = 256
    gated: bool = True
    instances: int = 8
    instance_loss: str = "svm"
    instance_weight: float = 0.3
    subtyping: bool = False
    dropout: float = 0.25
    per_class: bool = False

    @nn.compact
    def __call__(self, bag: Bag, train: bool = False) -> Out:
        rows = self.outputs if self.per_class else 1
        h = embedded(bag.features, self.embed, self.dropout, train)
        scores = attention_scores(h, self.attention, rows, self.gated, self.dropout, train)
        attention = masked_softmax(scores, bag.mask)
        # Row by class; class c is scored by its own row, or by the only one.
        by_row = nn.Dense(self.outputs, name="classify")(attention @ h)
        logits = jnp.diagonal(by_row) if self.per_class else by_row[0]

        ends, chosen = most_and_least(scores, bag.mask, self.instances)
        pairs = nn.Dense(2 * self.outputs, name="instances")(h[ends])
        pairs = jnp.moveaxis(pairs.reshape(*ends.shape, self.outputs, 2), 3, 0)
        pairs = pairs[jnp.arange(self.outputs), jnp.arange(self.outputs) if self.per_class else 0]
        more = {"instance_logits": pairs, "chosen": chosen}
        return Out(logits, attention, ((1 - self.instance_weight, logits),), more)

    def extra(self, out: Out, label: Array | int) -> Array:
        """The instance loss, times its weight, of a slide of class `label` in 0 … outputs - 1."""
        if self.instance_loss not in MARGINS:
            raise UserError(
                f"instance_loss={self.instance_loss!r} is none of {', '.join(MARGINS)}",
                "Choose one of them",
            )
        margin, chosen = MARGINS[self.instance_loss], out.more["chosen"]
        most, least = jnp.moveaxis(out.more["instance_logits"], 1, 0)  # (classes, k, 2) each

        def loss(pairs, true):
            each = jax.nn.softplus(margin - (pairs[..., true] - pairs[..., 1 - true]))
            return jnp.where(chosen, each, 0).sum(-1) / jnp.maximum(chosen.sum(), 1)

        total = (loss(most[label], 1) + loss(least[label], 0)) / 2
        if self.subtyping:
            others = jnp.arange(self.outputs) != label
            total = (total + jnp.where(others, loss(most, 0), 0).sum()) / self.outputs
        return self.instance_weight * total


class CLAM_MB(CLAM_SB):
    """CLAM with a branch for each class (Lu et al. 2021), which has a w of its own:

        a_c = softmax(w_c · (tanh(V h_i) ⊙ σ(U h_i)))      logit_c = (Σ a_ci h_i) · C_c + c_c

    and whose instance loss of class c chooses instances by a_c. All else is as in `CLAM_SB`.
    """

    per_class: bool = True


def most_and_least(scores: Array, mask: Array, k: int) -> tuple[Array, Array]:
    """The k instances with the largest and the k with the smallest score of each row.

    Args:
        scores: (r, m).
        mask: (m,).

    Returns:
        (r, 2, k') indices, k' = min(k, m), and (k',) which of them count: the first min(k, n // 2) of n
        instances, so that none is on both ends.
    """
    k = min(k, mask.size)
    ends = [jax.lax.top_k(jnp.where(mask, s, -jnp.inf), k)[1] for s in (scores, -scores)]
    return jnp.stack(ends, 1), jnp.arange(k) < mask.sum() // 2
