"""Where each parameter lives: a mesh and one list of (path, rule)."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pathme_jax.errors import UserError
from pathme_jax.training.contract import Rules, resolve

DEFAULT: Rules = [(".*", "replicate")]


def make_mesh() -> Mesh:
    """All devices on one axis, "data". Auto axes: JAX's new default, Explicit, refuses plain models."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def place(
    shapes: dict[str, jax.ShapeDtypeStruct], rules: Rules, mesh: Mesh
) -> dict[str, NamedSharding]:
    """Path to sharding. Rules: "replicate", or "fsdp" (the largest dimension the mesh divides)."""
    placed = {}
    for path, (rule, _) in resolve(rules, list(shapes), "sharding").items():
        spec = PartitionSpec()
        if rule == "fsdp":
            spec = _largest(shapes[path].shape, mesh.size)
        elif rule != "replicate":
            raise UserError(f"sharding rule {rule!r} for {path}", 'Expected "replicate" or "fsdp"')
        placed[path] = NamedSharding(mesh, spec)
    return placed


def _largest(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    free = [n if n % devices == 0 else 0 for n in shape]
    if not any(free):
        return PartitionSpec()
    axis = int(np.argmax(free))
    return PartitionSpec(*[None] * axis, "data")
