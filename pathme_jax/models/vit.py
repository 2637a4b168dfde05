"""The patch encoder: a vision transformer with masked tokens, in DINOv2's form."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from pathme_jax.models.transformer import (
    Dtype,
    Stack,
    fan_in_normal,
    resize_positions,
    trunc_normal,
)

Array = jax.Array


class ViT(nn.Module):
    """Images to a CLS token and one token a patch.

    Attributes:
        grid: side of the position grid it learns; other image sizes interpolate it.
    """

    patch: int = 16
    width: int = 96
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    layer_scale: float = 1e-5
    registers: int = 0
    grid: int = 14
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Array, mask: Array | None = None, keep: Array | None = None
    ) -> dict[str, Array]:
        """images: (b, h, w, 3) normalised. mask: (b, n) bool, True hides that patch's content.

        keep: (depth, 2, b) stochastic-depth factors.

        Returns:
            {"cls": (b, d), "tokens": (b, n, d)}, both after the last LayerNorm.
        """
        b, h, w, _ = images.shape
        rows, columns = h // self.patch, w // self.patch
        # A convolution with stride = kernel is this matrix product, and XLA:CPU is faster at the latter.
        patches = images.reshape(b, rows, self.patch, columns, self.patch, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, 3 * self.patch**2)
        tokens = nn.Dense(
            self.width, kernel_init=fan_in_normal, dtype=self.dtype, name="patch_embed"
        )(patches)
        hidden = self.param("mask_token", nn.initializers.zeros, (self.width,))
        if mask is not None:
            tokens = jnp.where(mask[..., None], hidden.astype(tokens.dtype), tokens)
        positions = self.param("positions", trunc_normal, (self.grid, self.grid, self.width))
        tokens = tokens + resize_positions(positions, (rows, columns)).reshape(
            1, rows * columns, self.width
        ).astype(tokens.dtype)
        lead = self.param("cls_token", nn.initializers.normal(1e-6), (1, self.width))
        if self.registers:
            extra = self.param(
                "registers", nn.initializers.normal(1e-6), (self.registers, self.width)
            )
            lead = jnp.concatenate([lead, extra])
        lead = jnp.broadcast_to(lead.astype(tokens.dtype), (b, *lead.shape))
        x = jnp.concatenate([lead, tokens], 1)
        x = Stack(
            self.depth, self.heads, self.mlp_ratio, self.layer_scale, self.dtype, name="blocks"
        )(x, None, keep)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        return {"cls": x[:, 0], "tokens": x[:, 1 + self.registers :]}
