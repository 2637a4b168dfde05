"""The pre-norm transformer shared by patch and region encoders (Dosovitskiy 2021; DINOv2's LayerScale).

Modules take any keys they need as arrays: a model never draws randomness itself, so that one sample's
result does not depend on which device or batch slot it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pathme_jax.models.placement import by_sample, whole

Array = jax.Array
Dtype = Any
Group = tuple[Array, "Array | None", "Array | None"]  # tokens, valid, kept: see Stack

trunc_normal = nn.initializers.truncated_normal(0.02)
# DINOv2 draws every matrix at 0.02, which suits inputs 1024 wide. This is 0.02 there, and keeps the
# signal of narrow models alive: at width 96, a fixed 0.02 shrinks it fivefold a layer.
fan_in_normal = nn.initializers.variance_scaling(0.41, "fan_in", "truncated_normal")


def attend(
    query: Array, key: Array, value: Array, valid: Array | None, implementation: str = "xla"
) -> Array:
    """Softmax attention over keys with the softmax in fp32.

    Args:
        query: (b, n, heads, c). key, value: (b, m, heads, c).
        valid: (b, m) or (b, n, m) bool, which keys may be attended to; None for all. A query without
            one valid key gets zeros, never NaN.
        implementation: "xla", or "cudnn" for the fused kernel, which takes bfloat16 and no `valid`.

    Returns:
        (b, n, heads, c).

    Raises:
        ValueError: an implementation that is not one of the two, or cannot do what is asked.
    """
    if implementation == "cudnn":
        if query.dtype != jnp.bfloat16 or valid is not None:
            raise ValueError(
                f"attention='cudnn' takes bfloat16 and every key valid, not {query.dtype}"
                f"{'' if valid is None else ' with a mask'}; use 'xla'"
            )
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    if implementation != "xla":
        raise ValueError(f"attention={implementation!r}; expected 'xla' or 'cudnn'")
    query = query * query.shape[-1] ** -0.5  # n c products, where scaling the logits takes n m
    logits = jnp.einsum("bnhc,bmhc->bhnm", query, key, preferred_element_type=jnp.float32)
    if valid is None:
        weights = jax.nn.softmax(logits, -1)
    else:
        seen = valid[:, None, None, :] if valid.ndim == 2 else valid[:, None]
        weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), -1)
        weights = jnp.where(seen, weights, 0.0)
    return jnp.einsum("bhnm,bmhc->bnhc", weights.astype(value.dtype), value)


class SelfAttention(nn.Module):
    heads: int
    attention: str = "xla"
    dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Array, valid: Array | None) -> Array:
        b, n, d = x.shape
        qkv = nn.Dense(3 * d, kernel_init=fan_in_normal, dtype=self.dtype, name="qkv")(x)
        query, key, value = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, d // self.heads), 2, 0)
        mixed = attend(query, key, value, valid, self.attention).reshape(b, n, d)
        return nn.Dense(d, kernel_init=fan_in_normal, dtype=self.dtype, name="out")(mixed)


def gated_width(width: int, ratio: float) -> int:
    """Hidden width of SwiGLU beside an MLP of ratio * width: 2/3 of it, in whole eights (DINOv2)."""
    return -(-int(width * ratio * 2 / 3) // 8) * 8


class FeedForward(nn.Module):
    """ "mlp": down(gelu(up(x))), `ratio` d wide. "swiglu" (Shazeer 2020): down(silu(a) b), [a, b] = up(x).

    SwiGLU's width is 2/3 of that, which keeps the number of weights, rounded up to a multiple of 8.
    """

    kind: str = "mlp"
    ratio: float = 4.0
    dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, kernel_init=fan_in_normal, dtype=self.dtype, name=name)

        d = x.shape[-1]
        if self.kind == "mlp":
            hidden = nn.gelu(dense(round(d * self.ratio), "up")(x), approximate=False)
        elif self.kind == "swiglu":
            width = gated_width(d, self.ratio)
            gate, hidden = jnp.split(dense(2 * width, "up")(x), 2, -1)
            hidden = nn.silu(gate) * hidden
        else:
            raise ValueError(f"ffn={self.kind!r}; expected 'mlp' or 'swiglu'")
        return dense(d, "down")(hidden)


class Block(nn.Module):
    """x + scale * branch(norm(x)), twice. LayerScale starts at `layer_scale`; 0 leaves it out."""

    heads: int
    mlp_ratio: float = 4.0
    ffn: str = "mlp"
    layer_scale: float = 1e-5
    epsilon: float = 1e-6
    attention: str = "xla"
    dtype: Dtype = "float32"

    @nn.compact
    def __call__(self, x: Array, valid: Array | None, kept: Array | None) -> Array:
        """x: (b, n, d). valid: see `attend`. kept: (2, blocks, k), see `drop_path_rows`; None keeps all."""
        attention = SelfAttention(self.heads, self.attention, self.dtype, name="attention")
        mlp = FeedForward(self.ffn, self.mlp_ratio, self.dtype, name="mlp")

        def branch(name: str, x: Array, valid: Array | None) -> Array:
            x = by_sample(x)
            y = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name=f"norm_{name}")(x)
            y = by_sample(attention(y, valid) if name == "attention" else mlp(y))
            if not self.layer_scale:
                return y
            initial = nn.initializers.constant(self.layer_scale)
            return y * self.param(f"scale_{name}", initial, y.shape[-1:]).astype(y.dtype)

        for i, name in enumerate(("attention", "mlp")):
            if kept is None:
                x = x + branch(name, x, valid)
            else:
                there = None if valid is None else take_rows(valid, kept[i])
                x = add_rows(x, kept[i], branch(name, take_rows(x, kept[i]), there))
        return x


class Stack(nn.Module):
    """`depth` blocks as one scan: compiled once, whatever the depth. Parameters get a leading layer axis.

    Groups of tokens of different lengths go through a layer together, so that weights sharded over
    devices are gathered once a layer and not once a group.

    Each layer may start by replacing tokens 1 … p with its own prompts (Jia 2022, "deep"), so that what
    earlier layers made of theirs is dropped.

    Attributes:
        remat: what the backward pass computes again, to save memory: "none"; "dots", all but the
            products with weights; "full", a whole layer.
        unroll: layers a turn of the scan. All of them compile longer and save the copies between turns:
            about a tenth of the time on a CPU.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    ffn: str = "mlp"
    layer_scale: float = 1e-5
    remat: str = "none"
    unroll: int = 1
    attention: str = "xla"
    dtype: Dtype = "float32"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, groups: Sequence[Group], prompts: Array | None = None) -> list[Array]:
        """The tokens of every group after the last block.

        Args:
            groups: of (tokens (b, n, d), valid (b, n) bool, kept (depth, 2, blocks, k)), the last two
                or None. prompts: (depth, p, d), for tokens 1 … p of every group.

        Raises:
            ValueError: an unknown `remat`, `ffn` or `attention`.
        """
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r}; expected one of {', '.join(REMAT)}")
        layer: Any = _Layer
        if not self.is_initializing():
            layer = nn.map_variables(_Layer, "params", lambda p: whole(p, self.dtype))
        if self.remat != "none":
            layer = nn.remat(layer, prevent_cse=False, policy=REMAT[self.remat])
        tokens, valid, kept = ([group[i] for group in groups] for i in range(3))
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.depth,
            unroll=self.unroll,
        )(
            dict(
                heads=self.heads,
                mlp_ratio=self.mlp_ratio,
                ffn=self.ffn,
                layer_scale=self.layer_scale,
                epsilon=self.epsilon,
                attention=self.attention,
                dtype=self.dtype,
            ),
            name="layers",
        )
        return layers(tokens, prompts, kept, valid)[0]


REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class _Layer(nn.Module):
    """What `Stack` scans: one `Block` of these settings, applied to every group."""

    settings: Mapping[str, Any]

    @nn.compact
    def __call__(
        self,
        tokens: list[Array],
        prompts: Array | None,
        kept: list[Array | None],
        valid: list[Array | None],
    ) -> tuple[list[Array], None]:
        block = Block(**self.settings, name="block")
        out = []
        for x, seen, rows in zip(tokens, valid, kept, strict=True):
            x = by_sample(x)
            if prompts is not None:
                count, width = prompts.shape
                fresh = jnp.broadcast_to(prompts.astype(x.dtype), (x.shape[0], count, width))
                x = jnp.concatenate([x[:, :1], fresh, x[:, 1 + count :]], 1)
            out.append(block(x, seen, rows))
        return out, None


def drop_path_rows(
    keys: Array, depth: int, rate: float, block: int, per_sample: int
) -> Array | None:
    """Stochastic depth (Huang 2016) as DINOv2 does it: rows left out of a residual branch cost nothing.

    The batch is cut into logical blocks of `block` consecutive samples, each with `per_sample` rows
    (its crops). Every branch of every layer is computed for the same number of rows of each block,
    drawn anew from the key of the block's first sample: shapes are static, and devices play no part.

    Args:
        keys: (b,) PRNG keys, one a sample. rate: the share of rows left out, in [0, 1).

    Returns:
        (depth, 2, b / block, k) int32, rows within their block in rising order, with
        k = max(1, round(block * per_sample * (1 - rate))); None where rate or per_sample is 0.

    Raises:
        ValueError: `block` does not divide b.
    """
    if rate == 0 or per_sample == 0:
        return None
    if len(keys) % block:
        raise ValueError(f"{len(keys)} samples do not divide into logical blocks of {block}")
    rows = block * per_sample
    k = max(1, round(rows * (1 - rate)))

    def one_block(key: Array) -> Array:
        draws = jax.random.split(key, (depth, 2))
        order = jax.vmap(jax.vmap(lambda key: jax.random.permutation(key, rows)))(draws)
        return jnp.sort(order[..., :k], -1)

    return jnp.moveaxis(jax.vmap(one_block)(keys[::block]), 0, 2)


def take_rows(x: Array, kept: Array) -> Array:
    """The kept rows of each logical block: (b, …) and (blocks, k) to (blocks * k, …)."""
    blocks = x.reshape(len(kept), -1, *x.shape[1:])
    return jax.vmap(lambda x, at: x.at[at].get(**WITHIN))(blocks, kept).reshape(-1, *x.shape[1:])


def add_rows(x: Array, kept: Array, out: Array) -> Array:
    """x (b, …) with `out` (blocks * k, …) added at the kept rows, scaled by rows / k, so that the mean
    over draws is that of all rows."""
    blocks = x.reshape(len(kept), -1, *x.shape[1:])
    scaled = out.reshape(*kept.shape, *x.shape[1:]) * (blocks.shape[1] / kept.shape[1])
    return jax.vmap(lambda x, at, y: x.at[at].add(y, **WITHIN))(blocks, kept, scaled).reshape(
        x.shape
    )


# What is known of kept rows: without it XLA clamps every index and adds atomically.
WITHIN: dict[str, Any] = {
    "mode": "promise_in_bounds",
    "unique_indices": True,
    "indices_are_sorted": True,
}
