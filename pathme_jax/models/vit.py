"""The patch encoder: a vision transformer with masked tokens, in DINOv2's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pathme_jax.models.placement import by_sample
from pathme_jax.models.resample import resize_positions
from pathme_jax.models.transformer import Dtype, Group, Stack, fan_in_normal, trunc_normal

Array = jax.Array


# DINOv2's sizes (Oquab 2023, table 17; "tiny" and "huge" are DeiT's and ViT's own).
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(width=192, depth=12, heads=3, ffn="mlp"),
    "small": dict(width=384, depth=12, heads=6, ffn="mlp"),
    "base": dict(width=768, depth=12, heads=12, ffn="mlp"),
    "large": dict(width=1024, depth=24, heads=16, ffn="mlp"),
    "huge": dict(width=1280, depth=32, heads=16, ffn="mlp"),
    "giant": dict(width=1536, depth=40, heads=24, ffn="swiglu"),
}


class ViT(nn.Module):
    """Images to a CLS token and one token a patch: `ViT(patch=14, grid=37, **SIZES["large"])`.

    Attributes:
        ffn: "mlp" or "swiglu".
        layer_scale: where LayerScale starts; 0 leaves it out.
        registers: extra tokens that are thrown away at the end (Darcet 2024).
        grid: side of the position grid it learns; other image sizes interpolate it. The CLS token's
            own position is part of `cls_token`, a register's of `registers`.
        resample: how, see `resample.RULES`.
        epsilon: of every LayerNorm.
        remat: "none", "dots" or "full"; unroll: see `Stack`.
        attention: "xla" or "cudnn" (bfloat16 only): see `attend`.
        dtype: of the computation; parameters are float32.
    """

    patch: int = 16
    width: int = 96
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    ffn: str = "mlp"
    layer_scale: float = 1e-5
    registers: int = 0
    grid: int = 14
    resample: str = "bicubic antialias"
    epsilon: float = 1e-6
    remat: str = "none"
    unroll: int = 1
    attention: str = "xla"
    dtype: Dtype = "float32"

    def setup(self) -> None:
        # A convolution with stride = kernel is this matrix product, and XLA:CPU is faster at the latter.
        self.patch_embed = nn.Dense(self.width, kernel_init=fan_in_normal, dtype=self.dtype)
        self.mask_token = self.param("mask_token", nn.initializers.zeros, (self.width,))
        self.positions = self.param("positions", trunc_normal, (self.grid, self.grid, self.width))
        small = nn.initializers.normal(1e-6)
        lead = [self.param("cls_token", small, (1, self.width))]
        if self.registers:
            lead.append(self.param("registers", small, (self.registers, self.width)))
        self.lead = jnp.concatenate(lead)
        self.blocks = Stack(
            self.depth,
            self.heads,
            self.mlp_ratio,
            self.ffn,
            self.layer_scale,
            self.remat,
            self.unroll,
            self.attention,
            self.dtype,
            self.epsilon,
        )
        self.norm = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype)

    def __call__(
        self, images: Array, mask: Array | None = None, kept: Array | None = None
    ) -> dict[str, Array]:
        """images: (b, h, w, 3) normalised. mask: (b, n) bool, True hides that patch's content.

        kept: (depth, 2, blocks, k) rows of each logical block that a branch is computed for, as
            `drop_path_rows` draws them; None for all.

        Returns:
            {"cls": (b, d), "tokens": (b, n, d)}, both after the last LayerNorm.
        """
        return self.groups([(images, mask, kept)])[0]

    def groups(self, groups: Sequence[Group]) -> list[dict[str, Array]]:
        """Images of several sizes at once: of (images, mask, kept), what `__call__` returns for each."""
        tokens: list[Group] = [
            (self._embed(images, mask), None, kept) for images, mask, kept in groups
        ]
        out = [self.norm(x) for x in self.blocks(tokens)]
        return [{"cls": x[:, 0], "tokens": x[:, 1 + self.registers :]} for x in out]

    def _embed(self, images: Array, mask: Array | None) -> Array:
        """CLS, registers and patches: (b, 1 + r + n, d)."""
        b, h, w, _ = images.shape
        rows, columns = h // self.patch, w // self.patch
        patches = images.reshape(b, rows, self.patch, columns, self.patch, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, 3 * self.patch**2)
        tokens = by_sample(self.patch_embed(by_sample(patches)))
        if mask is not None:
            tokens = jnp.where(mask[..., None], self.mask_token.astype(tokens.dtype), tokens)
        positions = resize_positions(self.positions, (rows, columns), self.resample)
        tokens += positions.reshape(1, rows * columns, self.width).astype(tokens.dtype)
        lead = self.lead.astype(tokens.dtype)
        return jnp.concatenate([jnp.broadcast_to(lead, (b, *lead.shape)), tokens], 1)
