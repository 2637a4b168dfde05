"""The pre-norm transformer shared by patch and region encoders (Dosovitskiy 2021; DINOv2's LayerScale).

Modules take any keys they need as arrays: a model never draws randomness itself, so that one sample's
result does not depend on which device or batch slot it is in.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Dtype = Any

trunc_normal = nn.initializers.truncated_normal(0.02)
# DINOv2 draws every matrix at 0.02, which suits inputs 1024 wide. This is 0.02 there, and keeps the
# signal of narrow models alive: at width 96, a fixed 0.02 shrinks it fivefold a layer.
fan_in_normal = nn.initializers.variance_scaling(0.41, "fan_in", "truncated_normal")


def attend(query: Array, key: Array, value: Array, valid: Array | None) -> Array:
    """Softmax attention over keys with the softmax in fp32.

    Args:
        query: (b, n, heads, c). key, value: (b, m, heads, c).
        valid: (b, m) or (b, n, m) bool, which keys may be attended to; None for all. A query without
            one valid key gets zeros, never NaN.

    Returns:
        (b, n, heads, c).
    """
    logits = jnp.einsum("bnhc,bmhc->bhnm", query, key) / jnp.sqrt(query.shape[-1]).astype(
        query.dtype
    )
    logits = logits.astype(jnp.float32)
    if valid is None:
        weights = jax.nn.softmax(logits, -1)
    else:
        seen = valid[:, None, None, :] if valid.ndim == 2 else valid[:, None]
        weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), -1)
        weights = jnp.where(seen, weights, 0.0)
    return jnp.einsum("bhnm,bmhc->bnhc", weights.astype(value.dtype), value)


class SelfAttention(nn.Module):
    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, valid: Array | None) -> Array:
        b, n, d = x.shape
        qkv = nn.Dense(3 * d, kernel_init=fan_in_normal, dtype=self.dtype, name="qkv")(x)
        query, key, value = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, d // self.heads), 2, 0)
        mixed = attend(query, key, value, valid).reshape(b, n, d)
        return nn.Dense(d, kernel_init=fan_in_normal, dtype=self.dtype, name="out")(mixed)


class Mlp(nn.Module):
    ratio: float = 4.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        d = x.shape[-1]
        hidden = nn.Dense(
            round(d * self.ratio), kernel_init=fan_in_normal, dtype=self.dtype, name="up"
        )(x)
        hidden = nn.gelu(hidden, approximate=False)
        return nn.Dense(d, kernel_init=fan_in_normal, dtype=self.dtype, name="down")(hidden)


class Block(nn.Module):
    """x + scale * branch(norm(x)), twice. LayerScale starts at `layer_scale`; 0 leaves it out."""

    heads: int
    mlp_ratio: float = 4.0
    layer_scale: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, valid: Array | None, keep: Array | None) -> Array:
        """x: (b, n, d). keep: (2, b), factors of the two residual branches; None keeps both."""
        branches = (
            (
                "attention",
                lambda y: SelfAttention(self.heads, self.dtype, name="attention")(y, valid),
            ),
            ("mlp", lambda y: Mlp(self.mlp_ratio, self.dtype, name="mlp")(y)),
        )
        for i, (name, branch) in enumerate(branches):
            out = branch(nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"norm_{name}")(x))
            if self.layer_scale:
                gamma = self.param(
                    f"scale_{name}", nn.initializers.constant(self.layer_scale), (x.shape[-1],)
                )
                out = out * gamma.astype(out.dtype)
            x = x + (out if keep is None else out * keep[i][:, None, None].astype(out.dtype))
        return x


class Stack(nn.Module):
    """`depth` blocks as one scan: compiled once, whatever the depth. Parameters get a leading layer axis.

    Each layer starts by replacing tokens 1 … p with its own prompts (Jia 2022, "deep"), so what earlier
    layers made of theirs is dropped; with p = 0 this is a plain transformer.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    layer_scale: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, valid: Array | None, keep: Array | None, prompts: Array | None = None
    ) -> Array:
        """x: (b, 1 + p + n, d). valid: (b, 1 + p + n) bool. keep: (depth, 2, b). prompts: (depth, p, d)."""
        if prompts is None:
            prompts = jnp.zeros((self.depth, 0, x.shape[-1]), x.dtype)
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.depth,
        )(self.heads, self.mlp_ratio, self.layer_scale, self.dtype, name="layers")
        return layers(x, prompts, keep, valid)[0]


class _Layer(nn.Module):
    heads: int
    mlp_ratio: float
    layer_scale: float
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Array, prompts: Array, keep: Array | None, valid: Array | None
    ) -> tuple[Array, None]:
        count, width = prompts.shape
        fresh = jnp.broadcast_to(prompts.astype(x.dtype), (len(x), count, width))
        x = jnp.concatenate([x[:, :1], fresh, x[:, 1 + count :]], 1)
        block = Block(self.heads, self.mlp_ratio, self.layer_scale, self.dtype, name="block")
        return block(x, valid, keep), None


def drop_path_factors(keys: Array, depth: int, rate: float) -> Array | None:
    """Stochastic depth (Huang 2016), drawn per sample: 0 with probability `rate`, else 1/(1-rate).

    Args:
        keys: (b,) PRNG keys, one a sample.

    Returns:
        (depth, 2, b), or None where rate is 0.
    """
    if not rate:
        return None
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (depth, 2)))(keys)
    return jnp.moveaxis(draw.astype(jnp.float32) / (1 - rate), 0, -1)


def resize_positions(positions: Array, shape: tuple[int, int]) -> Array:
    """Bicubic interpolation of a learned position grid: (h0, w0, d) to (*shape, d)."""
    if positions.shape[:2] == shape:
        return positions
    return jax.image.resize(
        positions.astype(jnp.float32), (*shape, positions.shape[-1]), "cubic", antialias=True
    )
