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
    the batch, then every sample the same total mass over prototypes (SwAV eq. 5; DINOv2). Since both
    only scale columns and rows, log Q = logits / temperature + u + v, and the two vectors are all that
    is kept between steps: the (b, k) result is written once.

    Args:
        logits: (b, k). weight: (b,), 0 for padding rows, which neither take part nor get mass.

    Returns:
        (b, k) fp32 probabilities; rows sum to 1, padding rows are 0.
    """
    real = weight[:, None] > 0
    scaled = logits.astype(jnp.float32) / temperature
    u = jnp.where(real, 0.0, -jnp.inf)
    v = jnp.zeros_like(scaled[:1])
    for _ in range(iterations):
        total = jax.nn.logsumexp(scaled + u, axis=0, keepdims=True)
        v = jnp.where(jnp.isfinite(total), -total, 0.0)  # a batch of padding alone has none
        u = jnp.where(real, -jax.nn.logsumexp(scaled + v, axis=1, keepdims=True), -jnp.inf)
    return jnp.exp(scaled + v + u)


def centred_softmax(logits: Array, centre: Array, temperature: Array | float) -> Array:
    """softmax((t - c) / tau): (..., k) and (k,) to (..., k)."""
    return jax.nn.softmax((logits.astype(jnp.float32) - centre) / temperature, -1)


def moved_centre(centre: Array, logits: Array, weight: Array, momentum: float = 0.9) -> Array:
    """c <- m c + (1 - m) mean_batch(t), rows weighted by `weight` (0 for padding); c if all are 0."""
    logits = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32)
    weight = weight.reshape(-1, 1)
    mean = (logits * weight).sum(0) / jnp.maximum(weight.sum(), 1e-6)
    return jnp.where(weight.sum() > 0, momentum * centre + (1 - momentum) * mean, centre)


def assign(
    how: str, logits: Array, centre: Array, temperature: Array | float, weight: Array
) -> Array:
    """The teacher's targets, `how` being one of ASSIGNMENTS: (b, k) logits to (b, k) probabilities."""
    if how == "sinkhorn":
        return sinkhorn(logits, temperature, weight)
    return centred_softmax(logits, centre, temperature)


@jax.checkpoint
def cross_entropy(student: Array, teacher: Array, temperature: float = 0.1) -> Array:
    """-sum_k p_t log softmax(s / tau): logits and probabilities (..., k) to (...).

    Written as sum(p_t) logsumexp(s / tau) - p_t . s / tau, and recomputed in the backward pass, so that
    no fp32 array beside its arguments is kept: iBOT has thousands of tokens by 65,536 prototypes.
    """
    scaled = student.astype(jnp.float32) / temperature
    return teacher.sum(-1) * jax.nn.logsumexp(scaled, -1) - (teacher * scaled).sum(-1)


def koleo(features: Array) -> Array:
    """-mean_i log ||x_i - x_nn(i)|| on the unit sphere, self excluded (Sablayrolles 2019).

    features: (b, d); the neighbour is chosen without gradient.

    Raises:
        ValueError: b < 2.
    """
    x, cosines = _on_sphere(features)
    gap = x - x[jnp.argmax(jax.lax.stop_gradient(cosines), 1)]
    # The 1e-8 sits inside the root as well: two equal samples would have an infinite gradient.
    return -jnp.log(jnp.sqrt((gap * gap).sum(-1) + 1e-16) + 1e-8).mean()


def kde(features: Array, kappa: float = 5.0) -> Array:
    """mean_i log mean_{j != i} exp(kappa cos(x_i, x_j)): Virchow2's kernel density, in KoLeo's place.

    Smooth everywhere, so that tiles which look alike, as pathology has many, cost kappa at most, where
    KoLeo's distance to the nearest one diverges (Zimmermann 2024; Wang & Isola 2020).

    features: (b, d).

    Raises:
        ValueError: b < 2.
    """
    _, cosines = _on_sphere(features)
    others = jnp.log(len(cosines) - 1.0)
    return (jax.nn.logsumexp(kappa * cosines, axis=1) - others).mean()


def _on_sphere(features: Array) -> tuple[Array, Array]:
    """(b, d) to unit rows, fp32, and their (b, b) cosines, with -inf for a row and itself."""
    if len(features) < 2:
        raise ValueError(
            f"{len(features)} feature vector has no neighbour; a batch needs two or more"
        )
    x = features.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-16))
    # Close to collapse all cosines are nearly 1, beyond what TF32 or bf16 products tell apart.
    cosines = jnp.matmul(x, x.T, precision="highest")
    return x, jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, cosines)


def entropy(probabilities: Array) -> Array:
    """Mean entropy of rows, in nats: (..., k) to ()."""
    return -(probabilities * jnp.log(probabilities + 1e-12)).sum(-1).mean()


def usage(probabilities: Array, weight: Array) -> Array:
    """Entropy of the mean assignment over log k: 1 = every prototype used alike, 0 = one only."""
    rows, weight = probabilities.reshape(-1, probabilities.shape[-1]), weight.reshape(-1, 1)
    mean = (rows * weight).sum(0) / jnp.maximum(weight.sum(), 1e-6)
    return entropy(mean) / jnp.log(mean.shape[-1])
