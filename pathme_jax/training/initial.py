"""Starting from weights that exist: a converted encoder, or the product of any finished run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.models.transformer import resize_positions
from pathme_jax.training.checkpoints import fingerprint, load_product
from pathme_jax.training.contract import Config, flat


def load(config: Config) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """config.initial: {"into": path of parameters, e.g. "student/backbone", "path": a work folder or ""}.

    Returns:
        flat {path: array} below `into`; {into: sha256 of the parameters}, part of a run's identity. Both
        are empty where `path` is.
    """
    settings = config.get("initial") or {}
    if not settings.get("path"):
        return {}, {}
    _, _, params = load_product(settings["path"])
    weights = {f"{settings['into']}/{path}": np.asarray(x) for path, x in flat(params).items()}
    return weights, {settings["into"]: fingerprint(params)}


def put(
    state: dict[str, Any],
    weights: Mapping[str, np.ndarray],
    wheres: Iterable[str],
    follows: Mapping[str, str],
) -> dict[str, Any]:
    """The first state with `weights` in place of what was drawn, in the trained parameters and in the
    teachers that follow them. A grid of positions of another size is interpolated.

    Args:
        follows: path of an EMA parameter to the path it follows.

    Raises:
        UserError: a parameter below `wheres` is missing, unknown or of another shape.
    """
    trained, ema = dict(state["trained"]), dict(state["ema"])
    wheres = tuple(f"{where}/" for where in wheres)
    below = {p for p in trained if p.startswith(wheres)}
    missing, unknown = sorted(below - set(weights)), sorted(set(weights) - below)
    if missing or unknown:
        raise UserError(
            f"config.initial does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}",
            "config.model must be the architecture those weights were trained with",
        )
    placed = {}
    for path, value in weights.items():
        old = trained[path]
        if path.endswith("/positions") and value.ndim == 3 and value.shape[-1] == old.shape[-1]:
            value = np.asarray(resize_positions(jnp.asarray(value), old.shape[:2]))
        if value.shape != old.shape:
            raise UserError(
                f"config.initial: {path} has shape {value.shape}, the model's is {old.shape}",
                "config.model must be the architecture those weights were trained with",
            )
        placed[path] = value
        trained[path] = jax.device_put(value.astype(old.dtype), old.sharding)
    for path, source in follows.items():
        if source in placed:
            ema[path] = jax.device_put(placed[source].astype(np.float32), ema[path].sharding)
    return {**state, "trained": trained, "ema": ema}
