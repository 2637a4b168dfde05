"""TransMIL: a transformer over instances with Nyström attention and convolutional positions (Shao et al. 2021)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from pathme_jax.mil.heads.common import Bag, Out, embedded, masked_softmax, single
from pathme_jax.mil.heads.square import (
    SequenceConv,
    depthwise,
    largest_side,
    packed,
    side_of,
)

LARGE = 30_000  # tokens, beyond which heads take turns and are computed twice


class TransMIL(nn.Module):
    """Two Nyström attention layers with positions from convolutions (PPEG) between (Shao et al. 2021, alg. 2).

        x = [CLS; h, and h's first instances again until the square of side H = ⌈√n⌉ is full]
        x ← x + NA(LN x);   x ← PPEG(x);   x ← x + NA(LN x);   logits = C · LN(x)[CLS]

    The square, the landmarks and the layers' front padding depend on the number of instances, not on the size they
    are padded to. Depends on the order of the instances, by design.

    Cost: O(m · landmarks) in time and memory; the gradient of 200,000 × 1,024 features takes 17 GiB by XLA's count
    with the paper's sizes (CPU), since heads then take turns. Small bags pay for the pseudo-inverse of landmarks ×
    landmarks a head: fewer `landmarks` do for them.

    `attention`, (1, m), is torchmil's, row CLS of the second layer averaged over heads, with three steps more to
    make it a distribution: repeated instances get the sum of their places, what Nyström's approximation makes
    negative is zero, and the rest is divided by its sum.

    Attributes:
        outputs: o.
        hidden: width of the tokens.
        landmarks: of the Nyström attention; the paper has hidden / 2.
        pinv_iterations: of the Moore–Penrose inverse.
        residual_width: of the convolution on the values.
        dropout: behind each attention layer.
    """

    outputs: int
    hidden: int = 512
    heads: int = 8
    landmarks: int = 256
    pinv_iterations: int = 6
    residual_width: int = 33
    dropout: float = 0.1

    @nn.compact
    def __call__(self, bag: Bag, train: bool = False) -> Out:
        h = embedded(bag.features, (self.hidden,), 0.0, train)
        rows, count = packed(bag.mask)
        side, top = side_of(count), largest_side(len(bag.mask))
        rows = rows[jnp.arange(top * top) % count]  # of the instance in each place of the square
        cls = self.param("cls", nn.initializers.normal(1.0), (1, self.hidden))
        x = jnp.concatenate([cls, h[rows]])

        x = self._attend(0, x, side, train)[0]
        x = x.at[1:].set(Ppeg(name="ppeg")(x[1:], side, top))
        x, attention = self._attend(1, x, side, train)

        logits = nn.Dense(self.outputs, name="classify")(nn.LayerNorm(1e-5, name="norm")(x[0]))
        places = jnp.where(jnp.arange(top * top) < side * side, attention[1:], 0)
        return single(logits, _distribution(places, rows, bag.mask))

    def _attend(self, layer: int, x: Array, side: Array, train: bool) -> tuple[Array, Array]:
        attended, attention = NystromAttention(
            heads=self.heads,
            landmarks=self.landmarks,
            pinv_iterations=self.pinv_iterations,
            residual_width=self.residual_width,
            name=f"attention_{layer}",
        )(nn.LayerNorm(1e-5, name=f"norm_{layer}")(x), side * side + 1)
        return x + nn.Dropout(self.dropout, deterministic=not train)(attended), attention


class NystromAttention(nn.Module):
    """Self-attention through landmarks, the means of equal stretches of the sequence (Xiong et al. 2021, eq. 15).

        softmax(q k̃ᵀ) · pinv(softmax(q̃ k̃ᵀ)) · softmax(q̃ kᵀ) v + conv(v)

    As in the implementation TransMIL uses, the sequence is made a multiple of the landmarks by zeros in front, which
    take part in the means and as keys of score zero. Here they are counted rather than stored.
    """

    heads: int
    landmarks: int
    pinv_iterations: int
    residual_width: int

    @nn.compact
    def __call__(self, x: Array, length: Array) -> tuple[Array, Array]:
        """(t, c), of which the first `length` tokens count → (t, c), and the mean over heads of row 0, (t,)."""
        size, width = x.shape
        real = jnp.arange(size) < length
        qkv = nn.Dense(3 * width, use_bias=False, name="qkv")(x)
        qkv = jnp.where(real[:, None], qkv, 0).reshape(size, 3, self.heads, -1)
        q, k, v = qkv.transpose(1, 2, 0, 3)
        q = q * q.shape[-1] ** -0.5

        stretch = -(-length // self.landmarks)
        front = stretch * self.landmarks - length
        q_mean, k_mean = (self._means(each, real, stretch, front) for each in (q, k))
        between = nn.softmax(jnp.einsum("hid,hjd->hij", q_mean, k_mean))
        inverse = pseudo_inverse(between, self.pinv_iterations)

        def of_head(head: tuple[Array, ...]) -> tuple[Array, Array]:
            q, k, v, q_mean, k_mean, inverse = head
            to_landmarks = nn.softmax(q @ k_mean.T)
            from_landmarks = _softmax_with_zeros(q_mean @ k.T, real, front)
            row = to_landmarks[0] @ inverse @ from_landmarks
            return to_landmarks @ (inverse @ (from_landmarks @ v)), row

        # The (heads, t, landmarks) of a large bag, and of its gradient, do not fit at once.
        each_head = functools.partial(jax.lax.map, jax.checkpoint(of_head, prevent_cse=False))
        apply = each_head if size > LARGE else jax.vmap(of_head)
        out, rows = apply((q, k, v, q_mean, k_mean, inverse))
        out = out + SequenceConv(self.residual_width, name="residual")(v)
        out = out.transpose(1, 0, 2).reshape(size, width)
        return nn.Dense(width, name="out")(out), rows.mean(0)

    def _means(self, x: Array, real: Array, stretch: Array, front: Array) -> Array:
        """(heads, t, w), zero where not real → (heads, landmarks, w)"""
        stretches = jnp.where(real, (jnp.arange(x.shape[1]) + front) // stretch, 0)
        sums = jax.ops.segment_sum(x.transpose(1, 0, 2), stretches, self.landmarks)
        return sums.transpose(1, 0, 2) / stretch


def _softmax_with_zeros(scores: Array, real: Array, zeros: Array) -> Array:
    """Softmax over the real entries of the last axis and over `zeros` further scores of zero, which it leaves out."""
    # That many zeros weigh as much as one score of log(zeros).
    extra = jnp.full((*scores.shape[:-1], 1), jnp.log(jnp.maximum(zeros, 1)))
    mask = jnp.append(real, zeros > 0)
    return masked_softmax(jnp.concatenate([scores, extra], -1), mask)[..., :-1]


def pseudo_inverse(x: Array, iterations: int) -> Array:
    """Moore–Penrose inverse of (heads, l, l) matrices of non-negative entries, iterated (Xiong et al. 2021, eq. 11).

    The first guess divides by the largest sums over all heads, as the authors' code does.
    """
    z = x.mT / (x.sum(-1).max() * x.sum(-2).max())
    one = jnp.eye(x.shape[-1])
    for _ in range(iterations):
        xz = x @ z
        z = 0.25 * z @ (13 * one - xz @ (15 * one - xz @ (7 * one - xz)))
    return z


class _Weights(nn.Module):
    """One kernel a channel, (height, width, c), and a bias each."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        height, width, channels = self.shape
        own = (height, width, 1, channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), own)
        return kernel[:, :, 0], self.param("bias", nn.initializers.zeros, (channels,))


class Ppeg(nn.Module):
    """Adds depthwise convolutions of width 7, 5 and 3 of the tokens laid out row by row in a square."""

    @nn.compact
    def __call__(self, x: Array, side: Array, top: int) -> Array:
        """(top², c), of which the first side² are laid out; the rest is returned as any finite value."""
        row, column = jnp.divmod(jnp.arange(top * top), top)
        inside = (row < side) & (column < side)
        image = jnp.where(inside[:, None], x[jnp.where(inside, row * side + column, 0)], 0)
        image = image.reshape(top, top, -1)
        kernel = jnp.zeros((7, 7, x.shape[-1])).at[3, 3].set(1)  # the image, and all three at once
        shift = jnp.zeros(x.shape[-1])
        for w in (7, 5, 3):
            own, bias = _Weights((w, w, x.shape[-1]), name=f"conv_{w}")()
            edge = (7 - w) // 2
            kernel = kernel.at[edge : 7 - edge, edge : 7 - edge].add(own)
            shift += bias
        found = depthwise(image, kernel) + shift
        row, column = jnp.divmod(jnp.arange(top * top), side)
        place = jnp.minimum(row * top + column, top * top - 1)
        return found.reshape(top * top, -1)[place]


def _distribution(places: Array, rows: Array, mask: Array) -> Array:
    """(p,) weights of places → (1, m) of the instances in them, none negative, their sum one."""
    weights = jax.ops.segment_sum(places, rows, len(mask))
    weights = jnp.where(mask, jnp.maximum(weights, 0), 0)
    weights = jnp.where(weights.sum() > 0, weights, mask.astype(jnp.float32))
    return (weights / jnp.maximum(weights.sum(), 1e-30))[None]
