"""The PatHME region encoder: one ViT over grids of tile features, prompts at 5x, and HMSA.

Equations follow METHODS 2.1 ("PMSD", "HMSA"). A region is a 4x4 grid of 5x features, each with its own
4x4 block of 20x features: a 16x16 grid.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from pathme_jax.models.heads import unit
from pathme_jax.models.resample import resize_positions
from pathme_jax.models.transformer import (
    Stack,
    attend,
    fan_in_normal,
    trunc_normal,
)

Array = jax.Array

COARSE, FINE = 4, 16  # tiles along a region's side at 5x and at 20x
CHILDREN = FINE // COARSE


class RegionEncoder(nn.Module):
    """One set of weights for both magnifications and every crop; only `coarse` has prompts.

    Methods return {"cls": (b, d), "tokens": (b, n, d), "pre_norm": (b, n, d)[, "prompts": (b, p, d)]};
    cls and tokens after the last LayerNorm, `pre_norm` and `prompts` before it, which is what HMSA reads.
    """

    width: int = 96
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    layer_scale: float = 1e-5
    prompts: int = 10

    def setup(self) -> None:
        self.embed = nn.Dense(self.width, kernel_init=fan_in_normal)
        self.cls_token = self.param("cls_token", trunc_normal, (self.width,))
        self.mask_token = self.param("mask_token", nn.initializers.zeros, (self.width,))
        self.positions = self.param("positions", trunc_normal, (FINE, FINE, self.width))
        self.deep_prompts = self.param(
            "prompts", nn.initializers.normal(1e-6), (self.depth, self.prompts, self.width)
        )
        self.blocks = Stack(self.depth, self.heads, self.mlp_ratio, layer_scale=self.layer_scale)
        self.norm = nn.LayerNorm(epsilon=1e-6)

    def fine(
        self, grid: Array, valid: Array, mask: Array | None = None, kept: Array | None = None
    ) -> dict[str, Array]:
        """20x features, or any crop of a scale that gets no prompts.

        Args:
            grid: (b, h, w, f). valid, mask: (b, h, w) bool: tissue is there; content is hidden.
            kept: (depth, 2, blocks, k), see `drop_path_rows`.
        """
        x, seen = self._embed(grid, valid, mask)
        return self._read(self.blocks([(x, seen, kept)])[0])

    def coarse(
        self, grid: Array, valid: Array, mask: Array | None = None, kept: Array | None = None
    ) -> dict[str, Array]:
        """5x features. Each block gets its own prompts; what it made of the last ones is dropped."""
        x, seen = self._embed(grid, valid, mask)
        slots = 1 + self.prompts
        place = jnp.zeros((x.shape[0], self.prompts, self.width), x.dtype)
        x = jnp.concatenate([x[:, :1], place, x[:, 1:]], 1)
        seen = jnp.concatenate([seen[:, :1], place[..., 0] == 0, seen[:, 1:]], 1)
        (x,) = self.blocks([(x, seen, kept)], self.deep_prompts)
        tokens = jnp.concatenate([x[:, :1], x[:, slots:]], 1)
        return {**self._read(tokens), "prompts": x[:, 1:slots]}

    def _embed(self, grid: Array, valid: Array, mask: Array | None) -> tuple[Array, Array]:
        b, h, w, _ = grid.shape
        x = nn.gelu(self.embed(grid), approximate=False)
        if mask is not None:
            x = jnp.where(mask[..., None], self.mask_token, x)
        x = (x + resize_positions(self.positions, (h, w))).reshape(b, h * w, self.width)
        cls = jnp.broadcast_to(self.cls_token, (b, 1, self.width))
        seen = jnp.concatenate([jnp.ones((b, 1), bool), valid.reshape(b, h * w)], 1)
        return jnp.concatenate([cls, x], 1), seen

    def _read(self, x: Array) -> dict[str, Array]:
        normed = self.norm(x)
        return {"cls": normed[:, 0], "tokens": normed[:, 1:], "pre_norm": x[:, 1:]}


def children_of(fine: Array) -> Array:
    """Groups a 16x16 grid by 5x parent: (b, 16, 16, ...) to (b, 16 parents, 16 children, ...).

    Parents and children are both in raster order; the children of one parent are a 4x4 block of the
    grid, not sixteen consecutive tokens.
    """
    b, rest = fine.shape[0], fine.shape[3:]
    blocks = fine.reshape(b, COARSE, CHILDREN, COARSE, CHILDREN, *rest)
    return blocks.swapaxes(2, 3).reshape(b, COARSE * COARSE, CHILDREN * CHILDREN, *rest)


def child_mask() -> Array:
    """(16 parents, 256 raster fine tokens) bool: which fine token belongs to which 5x token."""
    index = children_of(jnp.arange(FINE * FINE).reshape(1, FINE, FINE))[0]
    return jnp.zeros((COARSE**2, FINE**2), bool).at[jnp.arange(COARSE**2)[:, None], index].set(True)


class CrossLayer(nn.Module):
    """q + MHA(unit(q), unit(W k)), then LayerNorm: one HMSA layer."""

    heads: int = 4

    @nn.compact
    def __call__(
        self, query: Array, seen: Array, drop: Array | None, fine: Array, fine_valid: Array
    ) -> tuple[Array, None]:
        """query: (b, n, d). seen: (n, m) bool. drop: (b, n, d) factors. fine: (b, m, d).

        fine_valid: (b, m) bool.
        """
        b, n, d = query.shape
        seen = seen & fine_valid[:, None, :]
        key = unit(nn.Dense(d, kernel_init=fan_in_normal, name="fine")(fine))

        def split(x: Array, name: str) -> Array:
            x = nn.Dense(d, kernel_init=fan_in_normal, name=name)(x)
            return x.reshape(b, -1, self.heads, d // self.heads)

        mixed = attend(split(unit(query), "query"), split(key, "key"), split(key, "value"), seen)
        out = nn.Dense(d, kernel_init=fan_in_normal, name="out")(mixed.reshape(b, n, d))
        if drop is not None:
            out = out * drop
        return nn.LayerNorm(epsilon=1e-6, name="norm")(query + out), None


class HMSA(nn.Module):
    """Hierarchical multi-scale attention: 16 coarse tokens and p prompts query the 256 fine tokens.

    In the local layers a coarse token sees only its own 4x4 children, prompts see every fine token; in
    the global layers every query sees every fine token.
    """

    local_layers: int = 4
    global_layers: int = 4
    heads: int = 4
    dropout: float = 0.1

    @nn.compact
    def __call__(
        self,
        coarse: Array,
        prompts: Array,
        fine: Array,
        fine_valid: Array,
        keys: Array | None = None,
    ) -> Array:
        """coarse: (b, 16, d), prompts: (b, p, d), fine: (b, 256, d) pre-norm; fine_valid: (b, 256).

        keys: (b,) PRNG keys for dropout; None switches it off.

        Returns:
            (b, 16 + p, d) multi-scale tokens, coarse first.
        """
        query = jnp.concatenate([coarse, prompts], 1)
        _, n, d = query.shape
        own = jnp.concatenate([child_mask(), jnp.ones((prompts.shape[1], FINE**2), bool)])
        layers = self.local_layers + self.global_layers
        seen = own | (jnp.arange(layers) >= self.local_layers)[:, None, None]
        drop = None
        if keys is not None and self.dropout:
            kept = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.dropout, (layers, n, d)))(
                keys
            )
            drop = jnp.moveaxis(kept.astype(query.dtype) / (1 - self.dropout), 1, 0)
        stack = nn.scan(
            CrossLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=layers,
        )(self.heads, name="layers")
        return stack(query, seen, drop, fine, fine_valid)[0]
