"""Losses of DINO, iBOT and DINOv2 (Caron 2021; Zhou 2022; Oquab 2023), all in fp32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

ASSIGNMENTS = ("sinkhorn", "centring")


def sinkhorn(
    logits: Array, temperature: Array | float, weight: Array, iterations: int = 3
) -> Array:
    """Sinkhorn-Knopp assignment of samples to prototypes, in the log domain.

    Q = exp(logits / temperature); `iterations` times: give every prototype the same total mass over
    the batch, then every sample the same total mass over prototypes (SwAV eq. 5; DINOv2).

    Args:
        logits: (b, k). weight: (b,), 0 for padding rows, which neither take part nor get mass.

    Returns:
        (b, k) probabilities; rows sum to 1, padding rows are 0.
    """
    q = logits.astype(jnp.float32) / temperature
    q = jnp.where(weight[:, None] > 0, q, -jnp.inf)
    for axis in (0, 1) * iterations:
        total = jax.nn.logsumexp(q, axis=axis, keepdims=True)
        q = q - jnp.where(jnp.isfinite(total), total, 0.0)  # padding rows stay at -inf
    return jnp.exp(q)


def centred_softmax(logits: Array, centre: Array, temperature: Array | float) -> Array:
    """softmax((t - c) / tau): (..., k) and (k,) to (..., k)."""
    return jax.nn.softmax((logits.astype(jnp.float32) - centre) / temperature, -1)


def moved_centre(centre: Array, logits: Array, weight: Array, momentum: float = 0.9) -> Array:
    """c <- m c + (1 - m) mean_batch(t), rows weighted by `weight` (0 for padding); c if all are 0."""
    logits, weight = logits.reshape(-1, logits.shape[-1]), weight.reshape(-1, 1)
    mean = (logits * weight).sum(0) / jnp.maximum(weight.sum(), 1e-6)
    return jnp.where(weight.sum() > 0, momentum * centre + (1 - momentum) * mean, centre)


def assign(
    how: str, logits: Array, centre: Array, temperature: Array | float, weight: Array
) -> Array:
    """The teacher's targets, `how` being one of ASSIGNMENTS: (b, k) logits to (b, k) probabilities."""
    if how == "sinkhorn":
        return sinkhorn(logits, temperature, weight)
    return centred_softmax(logits, centre, temperature)


def cross_entropy(student: Array, teacher: Array, temperature: float = 0.1) -> Array:
    """-sum_k p_t log softmax(s / tau): logits and probabilities (..., k) to (...)."""
    return -(teacher * jax.nn.log_softmax(student.astype(jnp.float32) / temperature, -1)).sum(-1)


def koleo(features: Array) -> Array:
    """-mean_i log ||x_i - x_nn(i)|| on the unit sphere, self excluded (Sablayrolles 2019).

    features: (b, d), b >= 2; the neighbour is chosen without gradient.
    """
    x = features.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)
    dots = jax.lax.stop_gradient(x @ x.T)
    nearest = jnp.argmax(jnp.where(jnp.eye(len(x), dtype=bool), -2.0, dots), 1)
    gap = x - x[nearest]
    # The 1e-8 sits inside the root as well: two equal samples would have an infinite gradient.
    return -jnp.log(jnp.sqrt((gap * gap).sum(-1) + 1e-16) + 1e-8).mean()


def entropy(probabilities: Array) -> Array:
    """Mean entropy of rows, in nats: (..., k) to ()."""
    return -(probabilities * jnp.log(probabilities + 1e-12)).sum(-1).mean()


def usage(probabilities: Array, weight: Array) -> Array:
    """Entropy of the mean assignment over log k: 1 = every prototype used alike, 0 = one only."""
    rows, weight = probabilities.reshape(-1, probabilities.shape[-1]), weight.reshape(-1, 1)
    mean = (rows * weight).sum(0) / jnp.maximum(weight.sum(), 1e-6)
    return entropy(mean) / jnp.log(mean.shape[-1])
