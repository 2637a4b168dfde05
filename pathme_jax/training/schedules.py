"""Schedules: functions of the step alone, so that a resumed run needs no state for them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def cosine(start: float, end: float, steps: int, warmup: int = 0, first: float = 0.0) -> Schedule:
    """Linear from `first` to `start` over `warmup` steps, then half a cosine to `end` at `steps`."""

    def value(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = first + (start - first) * step / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        falling = end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rising, falling)

    return value


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` over `steps`, then constant."""
    return lambda step: (
        start + (end - start) * jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0.0, 1.0)
    )
