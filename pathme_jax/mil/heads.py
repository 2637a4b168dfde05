"""Slide-level heads: a bag of m instances in, class logits and one attention weight per instance out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn


class ABMIL(nn.Module):
    """Gated attention-based MIL (Ilse et al. 2018, eq. 8 and 9; METHODS 4.2).

        h = dropout(relu(x W + b))      a = softmax(w · (tanh(h V) ⊙ sigmoid(h U)))      logits = (Σ a h) C

    Padding has no weight: any (m, mask) with the same valid instances gives the same answer, in any order.
    """

    classes: int
    hidden: int = 64
    attention: int = 32
    dropout: float = 0.25

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """x (..., m, d) and mask (..., m) → logits (..., c) and attention (..., m), which sums to one."""
        h = nn.relu(nn.Dense(self.hidden, name="embed")(x))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        tanh = jnp.tanh(nn.Dense(self.attention, name="tanh")(h))
        gate = nn.sigmoid(nn.Dense(self.attention, name="gate")(h))
        logit = nn.Dense(1, name="attend")(tanh * gate)[..., 0]
        a = nn.softmax(logit, axis=-1, where=mask)
        pooled = jnp.einsum("...m,...mh->...h", a, h)
        return nn.Dense(self.classes, name="classify")(pooled), a


def absorb(params: dict, mean: jax.Array, std: jax.Array) -> dict:
    """The head that takes raw features, given the one that takes (x - mean) / std.

    The standardisation goes into the first layer, so that members with different training folds share one x:
    (x - mean) / std · W + b = x · (W / std) + (b - mean / std · W).
    """
    kernel = params["embed"]["kernel"] / std[:, None]
    bias = params["embed"]["bias"] - mean @ kernel
    return {**params, "embed": {"kernel": kernel, "bias": bias}}
