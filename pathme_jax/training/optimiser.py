"""AdamW over a flat dict of parameters, with multipliers by path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pathme_jax.training.contract import Config, resolve
from pathme_jax.training.schedules import cosine

Array = jax.Array
Flat = dict[str, Array]


def make(config: Config, steps: int, paths: list[str]) -> tuple[Callable, Callable]:
    """`init(trained) -> state` and `update(grads, state, trained, step) -> (trained, state, metrics)`.

    config: lr, end_lr, warmup, weight_decay, end_weight_decay, b1, b2, clip and the rules
    `lr_multipliers`, `decay_multipliers`: lists of (path, factor), first match counts. Gradients are
    clipped to norm `clip` per submodule, the first two parts of a path, as in DINOv2.
    """
    lr = cosine(config.lr, config.end_lr, steps, config.warmup)
    decay = cosine(config.weight_decay, config.end_weight_decay, steps)
    lr_of = {p: v for p, (v, _) in resolve(_pairs(config.lr_multipliers), paths, "lr").items()}
    decay_of = {
        p: v for p, (v, _) in resolve(_pairs(config.decay_multipliers), paths, "decay").items()
    }
    adam = optax.scale_by_adam(config.b1, config.b2, mu_dtype=jnp.float32)

    def update(grads: Flat, state: Any, trained: Flat, step: Array) -> tuple[Flat, Any, Flat]:
        metrics: dict[str, Any] = {"grad_norm": optax.global_norm(grads)}
        grads = clip_per_submodule(grads, config.clip)
        moves: Any
        moves, state = adam.update(grads, state)
        new = {
            path: (
                value
                - lr(step) * lr_of[path] * (moves[path] + decay(step) * decay_of[path] * value)
            ).astype(value.dtype)
            for path, value in trained.items()
        }
        metrics["param_norm"] = optax.global_norm(new)
        metrics["update_norm"] = optax.global_norm({p: new[p] - trained[p] for p in new})
        metrics["lr"], metrics["weight_decay"] = lr(step), decay(step)
        return new, state, metrics

    return adam.init, update


def _pairs(rules: Any) -> list[tuple[str, float]]:
    return [(str(pattern), float(factor)) for pattern, factor in rules]


def clip_per_submodule(grads: Flat, limit: float) -> Flat:
    groups: dict[tuple[str, ...], Flat] = {}
    for path, grad in grads.items():
        groups.setdefault(tuple(path.split("/")[:2]), {})[path] = grad
    clipped = {}
    for group in groups.values():
        factor = jnp.minimum(1.0, limit / jnp.maximum(optax.global_norm(group), 1e-12))
        clipped |= {path: grad * factor for path, grad in group.items()}
    return clipped
