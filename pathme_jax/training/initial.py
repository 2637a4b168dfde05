"""Starting from weights that exist: a converted encoder, or the product of any finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pathme_jax.encoders import encoder, zoo
from pathme_jax.errors import UserError
from pathme_jax.files import read_json
from pathme_jax.models.resample import resize_positions
from pathme_jax.training.contract import Config, flat


def hashes(config: Config, before: Mapping[str, Any] | None) -> dict[str, str]:
    """{into: sha256 of the weights the run starts from}: part of its identity; {} for random ones.

    config.initial: {"into": path of parameters, e.g. "student/backbone", "path": a work folder or ""}.
    before: the identity of a run that has begun; its checkpoints hold the weights, so their folder may go.

    Raises:
        UserError: nothing to start from at `path`.
    """
    settings = config.get("initial") or {}
    if not settings.get("path"):
        return {}
    for about in ("product.json", encoder.ABOUT):
        if (Path(settings["path"]) / about).exists():
            return {settings["into"]: read_json(Path(settings["path"]) / about)["sha256"]}
    if before is not None:
        return dict(before.get("initial", {}))
    raise UserError(
        f"config.initial.path = {settings['path']}: no finished training run or converted encoder",
        "Give the --workdir of one, its folder best, or what pathme_jax.convert wrote",
    )


def weights(config: Config) -> dict[str, np.ndarray]:
    """{path below config.initial.into: array}; {} for random ones."""
    settings = config.get("initial") or {}
    if not settings.get("path"):
        return {}
    params = encoder.load(settings["path"]).params
    params = params.get("backbone", params)  # a converted encoder may have a pooler beside it
    return {f"{settings['into']}/{path}": np.asarray(x) for path, x in flat(params).items()}


def made_from(config: Config) -> list[dict[str, Any]]:
    """The encoders this run depends on, with their licences: its first weights', and those whose features
    are its columns. Kept in config.json, so that an export can tell."""
    settings = config.get("initial") or {}
    found = []
    if settings.get("path"):
        found += encoder.load(settings["path"]).lineage
    columns = flat(config.get("columns", ConfigDict()).to_dict()).values()
    recipe = Path(config.get("data", {}).get("path", "")) / "recipe.json"
    told = read_json(recipe).get("made_from", {}) if columns and recipe.exists() else {}
    for column in sorted(map(str, columns)):
        name = column.split("@")[0]
        found += told.get(column) or [{"name": name, **zoo.terms_of(name)}]
    return [one for i, one in enumerate(found) if one not in found[:i]]


def put(
    state: dict[str, Any], weights: Mapping[str, np.ndarray], follows: Mapping[str, str], into: str
) -> dict[str, Any]:
    """The first state with `weights` in place of what was drawn, in the trained parameters and in the
    teachers that follow them. A grid of positions of another size is interpolated.

    Args:
        follows: path of an EMA parameter to the path it follows. into: the path that must be filled.

    Raises:
        UserError: a parameter below `into` is missing, unknown or of another shape.
    """
    trained, ema = dict(state["trained"]), dict(state["ema"])
    below = {p for p in trained if p.startswith(f"{into}/")} if weights else set()
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
