"""What every slide-level head takes and answers, and the few steps they share.

A head sees one bag: callers map it over bags and over members with `jax.vmap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from pathme_jax.errors import UserError

TURNED = 256  # instances of a bag


@struct.dataclass
class Bag:
    """The m instances of one slide, or case, padded to a static size.

    Attributes:
        features: (m, d) float32; zeros where padded.
        mask: (m,) bool, True where there is an instance; these may be anywhere.
        cells: (m, 2) int32 row and column on the slide's grid of tiles; zeros where unknown.
    """

    features: Array
    mask: Array
    cells: Array


@struct.dataclass
class Out:
    """What a head says of one bag.

    Attributes:
        logits: (o,) float32, by which the slide is judged.
        attention: (a, m) float32 ≥ 0; a row sums to one over the instances and is zero on padding.
        streams: pairs of weight and logits (o,); while training the task's loss is taken of each.
        more: what the head's own `extra` loss needs.
    """

    logits: Array
    attention: Array
    streams: tuple[tuple[float | Array, Array], ...]
    more: dict[str, Any]


def single(logits: Array, attention: Array) -> Out:
    """The answer of a head whose logits are all that the task's loss is taken of."""
    return Out(logits, attention, ((1.0, logits),), {})


def embedded(features: Array, sizes: Sequence[int], dropout: float, train: bool) -> Array:
    """(m, d) → (m, last of sizes): layers "embed", "embed_1", …, each `dropout(relu(x W + b))`.

    To be called in a head's compact `__call__`. Without sizes the features are returned as they are.
    """
    turned = _turned(features)
    for i, size in enumerate(sizes):
        kernel, bias = Affine(size, name=f"embed_{i}" if i else "embed")(features.shape[-1])
        features = nn.relu(product(features, kernel, None if i else turned) + bias)
        features = nn.Dropout(dropout, deterministic=not train)(features)
    return features


class Affine(nn.Module):
    """The parameters of `nn.Dense`, without applying them."""

    features: int

    @nn.compact
    def __call__(self, inputs: int) -> tuple[Array, Array]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (inputs, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


def _turned(features: Array) -> Array | None:
    """(d, m) in memory, of a large bag on a CPU: one copy that all members of a population share makes the gradient
    of each member's first layer a fifth quicker. Small bags are quicker without."""
    if jax.default_backend() != "cpu" or len(features) < TURNED:
        return None
    # Without the barrier XLA would take the transposition back into the product.
    return jax.lax.optimization_barrier(features.T)


@jax.custom_vjp
def product(x: Array, kernel: Array, turned: Array | None = None) -> Array:
    """(m, i) · (i, o), whose gradient by the kernel is xᵀ · g as it stands.

    JAX's own is (gᵀ · x)ᵀ, for which XLA copies g transposed on a CPU: a tenth of a step on large bags.

    Args:
        turned: (i, m) xᵀ, where it is there already; it is given no gradient.
    """
    return x @ kernel


def _product(x: Array, kernel: Array, turned: Array | None) -> tuple[Array, tuple]:
    return x @ kernel, (x, kernel, turned)


def _product_gradient(kept: tuple, g: Array) -> tuple[Array, Array, None]:
    x, kernel, turned = kept
    by_kernel = jnp.einsum("mi,mo->io", x, g) if turned is None else turned @ g
    return g @ kernel.T, by_kernel, None


product.defvjp(_product, _product_gradient)


def attention_scores(
    h: Array, width: int, rows: int, gated: bool, dropout: float = 0.0, train: bool = False
) -> Array:
    """(m, h) → (rows, m) scores before the softmax: `w · tanh(V h)`, or gated `w · (tanh(V h) ⊙ σ(U h))`.

    Ilse et al. 2018, eq. 8 and 9. Rows share V and U and differ in w. To be called in a head's compact
    `__call__`; the layers are "tanh", "gate" and "attend".
    """
    drop = nn.Dropout(dropout, deterministic=not train)
    if gated:
        # One product for V and U: half as many, and their gradient's is a third faster (CPU).
        weights = [Affine(width, name=name)(h.shape[-1]) for name in ("tanh", "gate")]
        kernel, bias = (jnp.concatenate(each, -1) for each in zip(*weights, strict=True))
        v, u = jnp.split(product(h, kernel) + bias, 2, -1)
        hidden = drop(jnp.tanh(v)) * drop(nn.sigmoid(u))
    else:
        hidden = drop(jnp.tanh(nn.Dense(width, name="tanh")(h)))
    # No bias: the softmax over instances would not notice it.
    return nn.Dense(rows, use_bias=False, name="attend")(hidden).T


def masked_softmax(scores: Array, mask: Array, axis: int = -1) -> Array:
    """Softmax over the True entries of `mask`, in float32; zero elsewhere, and throughout where there are none.

    Unlike `jax.nn.softmax(..., where=mask)` neither the value nor the gradient of an all-False row is NaN.
    """
    scores, mask = jnp.broadcast_arrays(scores.astype(jnp.float32), mask)
    low = jnp.finfo(jnp.float32).min
    top = jax.lax.stop_gradient(jnp.max(scores, axis, keepdims=True, where=mask, initial=low))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - top, 0)), 0)
    total = weights.sum(axis, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def masked_max(values: Array, mask: Array) -> Array:
    """(m, h), (m,) → (h,): the largest over the instances; zero where there is none."""
    top = jnp.max(jnp.where(mask[:, None], values, -jnp.inf), 0)
    return jnp.where(mask.any(), top, 0)


def absorb(params: dict, mean: Array, std: Array) -> dict:
    """The head that takes raw features, given the one that takes (x - mean) / std, both (d,).

    The standardisation goes into the first layer, so that members with different training folds share one x:
    (x - mean) / std · W + b = x · (W / std) + (b - mean / std · W).
    The first layer is "embed", or the classifier of a pooling head without one.
    """
    if "embed" not in params and set(params) != {"classify"}:
        raise UserError(
            "embed=() leaves this head without a first layer that could standardise the features",
            "Give it at least one size, such as embed=(512,)",
        )
    first = "embed" if "embed" in params else "classify"
    kernel = params[first]["kernel"] / std[:, None]
    bias = params[first]["bias"] - mean @ kernel
    return {**params, first: {"kernel": kernel, "bias": bias}}
