"""Feature-matching losses and the rank that tells whether they collapsed."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def cosine_distance(x: Array, y: Array, weight: Array) -> Array:
    """1 - mean cos(x, y) over rows with weight: (..., d), (..., d), (...) to ()."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    dot = (x * y).sum(-1)
    norms = jax.lax.rsqrt((x * x).sum(-1) + 1e-12) * jax.lax.rsqrt((y * y).sum(-1) + 1e-12)
    return 1 - (dot * norms * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def effective_rank(x: Array, weight: Array) -> Array:
    """exp(entropy of the covariance's normalised eigenvalues) (Roy & Vetterli 2007).

    x: (n, d) rows, weight (n,) 0 or 1. Between 1 (collapsed to a line) and d.
    """
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)[:, None]
    count = jnp.maximum(weight.sum(), 1.0)
    x = (x - (x * weight).sum(0) / count) * weight
    spectrum = jnp.maximum(jnp.linalg.eigvalsh(x.T @ x / count), 0.0)
    share = spectrum / jnp.maximum(spectrum.sum(), 1e-12)
    return jnp.exp(-(share * jnp.log(share + 1e-12)).sum())
