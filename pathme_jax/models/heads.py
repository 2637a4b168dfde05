"""Projection heads of self-distillation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from pathme_jax.models.transformer import Dtype, fan_in_normal, trunc_normal

Array = jax.Array


def unit(x: Array, axis: int = -1) -> Array:
    """x / ||x|| in fp32, with a gradient that stays finite at zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis, keepdims=True) + 1e-12)


class PrototypeHead(nn.Module):
    """DINO's head: MLP, L2-normalised bottleneck, weight-normalised prototypes (Caron 2021, App. C).

    Weight normalisation is w = g v / ||v||. DINO fixes g = 1, so it is no parameter here, and a logit is
    the cosine between a bottleneck and a prototype.

    Attributes:
        dtype: of the MLP and of the products with prototypes, which are summed in float32, as the two
            normalisations are; parameters are float32.
    """

    prototypes: int
    hidden: int = 2048
    bottleneck: int = 256
    dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: (..., d) to logits (..., prototypes) in fp32, each a cosine."""

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, kernel_init=fan_in_normal, dtype=self.dtype, name=name)

        for i in range(2):
            x = nn.gelu(dense(self.hidden, f"dense_{i}")(x), approximate=False)
        x = unit(dense(self.bottleneck, "bottleneck")(x))
        kernel = unit(
            self.param("prototypes", trunc_normal, (self.bottleneck, self.prototypes)), axis=0
        )
        return jnp.matmul(
            x.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=jnp.float32
        )
