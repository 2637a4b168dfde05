"""Where each array lives: one mesh description and one list of (path, rule), both in the config.

Samples are spread over every axis of the mesh. "fsdp" also cuts parameters, their moments and the teacher;
"prototypes" cuts the last layer of heads whose logits would not fit on a device; "data" copies.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pathme_jax.errors import UserError
from pathme_jax.training.contract import Rules, resolve

Array = jax.Array
AXES = ("data", "fsdp", "prototypes")
SAMPLES = PartitionSpec(AXES)
DEFAULT: Rules = [(".*", "replicate")]


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh over all devices of all processes, as config.mesh says, e.g. {"data": -1, "fsdp": 8}.

    Axes not named have size 1; one may be -1: the devices the others leave. Default: all on "data".
    Axes are Auto: JAX's new default, Explicit, refuses plain Flax models.

    Raises:
        UserError: an unknown axis, or sizes that do not multiply to the number of devices.
    """
    sizes = dict(sizes or {"data": -1})
    devices = jax.device_count()
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise UserError(f"config.mesh names the axis {unknown[0]!r}", f"Axes are {', '.join(AXES)}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    known = int(np.prod([n for n in shape if n != -1]))
    if shape.count(-1) == 1 and known > 0 and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    if min(shape) < 1 or int(np.prod(shape)) != devices:
        raise UserError(
            f"config.mesh = {sizes} does not make {devices} devices",
            "Sizes must multiply to the number of devices; one of them may be -1, the rest",
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def place(
    shapes: Mapping[str, jax.ShapeDtypeStruct], rules: Rules, mesh: Mesh
) -> dict[str, NamedSharding]:
    """Path to sharding, by the first rule that matches:

    "replicate": a copy on each device.
    "fsdp": cut along the largest dimension that axis "fsdp" divides; whole where none is.
    "prototypes": the last dimension, cut along "prototypes" and "fsdp" together.
    """
    placed = {}
    for path, (rule, _) in resolve(rules, list(shapes), "sharding").items():
        shape = shapes[path].shape
        if rule == "replicate":
            spec = PartitionSpec()
        elif rule == "fsdp":
            spec = _largest(shape, mesh.shape["fsdp"])
        elif rule == "prototypes":
            parts = mesh.shape["prototypes"] * mesh.shape["fsdp"]
            if not shape or shape[-1] % parts:
                raise UserError(
                    f"{path} of shape {shape}: its last dimension does not divide into {parts} parts",
                    "Change config.head.prototypes or the sizes of prototypes and fsdp in config.mesh",
                )
            spec = PartitionSpec(*[None] * (len(shape) - 1), ("prototypes", "fsdp"))
        else:
            raise UserError(
                f"sharding rule {rule!r} for {path}", 'Expected "replicate", "fsdp" or "prototypes"'
            )
        placed[path] = NamedSharding(mesh, spec)
    return placed


def _largest(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    free = [n if n % parts == 0 else 0 for n in shape]
    if parts == 1 or not any(free):
        return PartitionSpec()
    axis = int(np.argmax(free))
    return PartitionSpec(*[None] * axis, "fsdp")


def spread(logits: Array) -> Array:
    """(rows, k) logits: rows over "data" and "fsdp", prototypes over "prototypes".

    Without a mesh in context, as in a test of one loss, nothing happens. Where "prototypes" has size 1
    rows stay on their devices; else the narrow bottleneck crosses it, not the (rows, k) logits.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return logits
    return jax.lax.with_sharding_constraint(logits, PartitionSpec(("data", "fsdp"), "prototypes"))
