"""AdamW over a flat dict of parameters, with rates by path and by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pathme_jax.errors import UserError
from pathme_jax.training.contract import Config, resolve
from pathme_jax.training.schedules import cosine

Array = jax.Array
Flat = dict[str, Array]
LAYERS = ("first", "each", "last")


def make(
    config: Config, steps: int, shapes: Mapping[str, jax.ShapeDtypeStruct], samples: int = 1
) -> tuple[Callable, Callable]:
    """`init(trained) -> state` and `update(grads, state, trained, step) -> (trained, state, metrics)`.

    config: lr, end_lr, warmup, weight_decay, end_weight_decay, b1, b2, clip, and what `rates` reads;
        with lr_samples, lr is for batches of that size and grows with the root of `samples` (DINOv2).
    Gradients are clipped to norm `clip` per submodule, the first two parts of a path, as in DINOv2.
    """
    peak = config.lr * (samples / config.get("lr_samples", samples)) ** 0.5
    lr = cosine(peak, config.end_lr, steps, config.warmup)
    decay = cosine(config.weight_decay, config.end_weight_decay, steps)
    rate = rates(config, shapes)
    adam = optax.scale_by_adam(config.b1, config.b2, mu_dtype=jnp.float32)

    def update(grads: Flat, state: Any, trained: Flat, step: Array) -> tuple[Flat, Any, Flat]:
        metrics: dict[str, Any] = {"grad_norm": optax.global_norm(grads)}
        grads = clip_per_submodule(grads, config.clip)
        moves: Any
        moves, state = adam.update(grads, state)
        new = {}
        for path, value in trained.items():
            of = rate[path]
            size = jnp.where(step < of["frozen_until"], 0.0, lr(step)) * of["lr"]
            change = moves[path] + decay(step) * of["decay"] * value
            new[path] = (value - size * change).astype(value.dtype)
        metrics["param_norm"] = optax.global_norm(new)
        metrics["update_norm"] = optax.global_norm({p: new[p] - trained[p] for p in new})
        metrics["lr"], metrics["weight_decay"] = lr(step), decay(step)
        return new, state, metrics

    return adam.init, update


def rates(config: Config, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, dict[str, Any]]:
    """Path to {"lr": float or (layers, 1, …) array, "decay": float, "frozen_until": step}.

    Each is a list of (path, value) whose first match counts and that must cover every parameter:

    lr_multipliers, decay_multipliers: factors.
    layers, with `layer_decay` m: where a parameter sits in a stack of d layers, for a rate of
        m^(d + 1 - layer): "first" is layer 0 (embeddings), "each" the stacked layers 1 … d along the
        leading axis, "last" 1 (no decay). d is the length of the stack among the paths that share the
        first two parts, e.g. student/backbone.
    frozen_until: the learning rate is 0 before that step (DINO's last layer).
    """
    paths = list(shapes)
    lr = _first(config.lr_multipliers, paths, "lr")
    decay = _first(config.decay_multipliers, paths, "decay")
    frozen = _first(config.get("frozen_until", ((".*", 0),)), paths, "frozen_until")
    layers = _first(config.get("layers", ((".*", "last"),)), paths, "layers")
    wrong = sorted({str(kind) for kind in layers.values()} - set(LAYERS))
    if wrong:
        raise UserError(
            f"config.optimiser.layers has {wrong[0]!r}", f"Expected one of {', '.join(LAYERS)}"
        )
    depth = {_submodule(p): shapes[p].shape[0] for p in paths if layers[p] == "each"}
    factor = float(config.get("layer_decay", 1.0))

    def by_layer(path: str) -> Any:
        if layers[path] == "last":
            return 1.0
        d = depth[_submodule(path)]
        if layers[path] == "first":
            return factor ** (d + 1)
        powers = factor ** (d - np.arange(d, dtype=np.float64))
        return powers.astype(np.float32).reshape(-1, *[1] * (len(shapes[path].shape) - 1))

    return {
        p: {
            "lr": float(lr[p]) * by_layer(p),
            "decay": float(decay[p]),
            "frozen_until": int(frozen[p]),
        }
        for p in paths
    }


def _first(rules: Any, paths: list[str], what: str) -> dict[str, Any]:
    """The first match of each path; a rule that none matches is a slip of the pen."""
    rules = [(str(pattern), value) for pattern, value in rules]
    idle = [pattern for pattern, _ in rules if not any(re.fullmatch(pattern, p) for p in paths)]
    if idle:
        raise UserError(
            f"config.optimiser: the {what} rule {idle[0]!r} matches no parameter",
            f"Paths look like {paths[0]}; `--dry-run` lists them",
        )
    return {path: value for path, (value, _) in resolve(rules, paths, what).items()}


def _submodule(path: str) -> tuple[str, ...]:
    return tuple(path.split("/")[:2])


def clip_per_submodule(grads: Flat, limit: float) -> Flat:
    groups: dict[tuple[str, ...], Flat] = {}
    for path, grad in grads.items():
        groups.setdefault(_submodule(path), {})[path] = grad
    clipped = {}
    for group in groups.values():
        factor = jnp.minimum(1.0, limit / jnp.maximum(optax.global_norm(group), 1e-12))
        clipped |= {path: grad * factor for path, grad in group.items()}
    return clipped
