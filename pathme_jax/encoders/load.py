"""Encoders by name or by the work folder of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from pathme_jax.encoders import descriptors
from pathme_jax.errors import UserError
from pathme_jax.training.checkpoints import load_product

FIXED: dict[str, Callable] = {
    "hed_texture": descriptors.hed_texture,
    "mean_rgb": descriptors.mean_rgb,
}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen encoder.

    Attributes:
        name: a fixed encoder's name, or `<workdir>-<hash8>` of a trained one: other weights, other name.
        record: "fields" (images) or "regions".
        columns: for regions, the feature columns it was trained on.
        encode: batch to features, compiled once a shape (see `Method.encode`).
    """

    name: str
    record: str
    columns: Mapping[str, str]
    encode: Callable[[Mapping[str, Any]], Any]


def load(name: str | Path) -> Encoder:
    """Raises UserError where it is neither a known name nor a finished training run."""
    if str(name) in FIXED:
        function = jax.jit(FIXED[str(name)])
        return Encoder(str(name), "fields", {}, lambda batch: function(batch["image"]))
    if not Path(name).is_dir():
        raise UserError(
            f"no encoder {str(name)!r}",
            f"Give one of {sorted(FIXED)} or the --workdir of a finished training run",
        )
    full, method, params = load_product(name)
    params = jax.device_put(params)
    encode = jax.jit(method.encode)
    spec = method.batch_spec
    return Encoder(full, spec.record, spec.columns, lambda batch: encode(params, batch))
