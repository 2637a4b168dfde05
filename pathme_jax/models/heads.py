"""Projection heads of self-distillation."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from pathme_jax.models.transformer import fan_in_normal, trunc_normal

Array = jax.Array


def unit(x: Array, axis: int = -1) -> Array:
    """x / ||x|| in fp32, with a gradient that stays finite at zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis, keepdims=True) + 1e-12)


class PrototypeHead(nn.Module):
    """DINO's head: MLP, L2-normalised bottleneck, weight-normalised prototypes (Caron 2021, App. C)."""

    prototypes: int
    hidden: int = 2048
    bottleneck: int = 256

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: (..., d) to logits (..., prototypes) in fp32, each a cosine."""
        for i in range(2):
            x = nn.gelu(
                nn.Dense(self.hidden, kernel_init=fan_in_normal, name=f"dense_{i}")(x),
                approximate=False,
            )
        x = unit(nn.Dense(self.bottleneck, kernel_init=fan_in_normal, name="bottleneck")(x))
        kernel = self.param("prototypes", trunc_normal, (self.bottleneck, self.prototypes))
        return x @ unit(kernel, axis=0)
