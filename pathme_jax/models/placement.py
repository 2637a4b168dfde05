"""Where tokens and weights are while a model runs on a mesh of devices.

Parameters may be cut over devices (fully sharded data parallelism). Left to itself, XLA then cuts the
tokens' width the same way and moves activations, a hundred times the bytes: so tokens are told to stay
with their samples, and a layer's weights to come whole. Without a mesh in context nothing happens.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

Array = jax.Array


def by_sample(x: Array) -> Array:
    """Rows spread over every device of the mesh, and nothing else of them cut: (b, …) as it is."""
    return _placed(x, lambda mesh: PartitionSpec(mesh.axis_names))


def whole(params: Any, dtype: Any) -> Any:
    """A layer's parameters on every device; matrices in `dtype` first, so that fewer bytes travel.

    Vectors keep their type: LayerNorm and LayerScale use them in fp32.
    """

    def gather(x: Array) -> Array:
        return _placed(x.astype(dtype) if x.ndim > 1 else x, lambda _: PartitionSpec())

    return jax.tree.map(gather, params)


def _placed(x: Array, spec: Any) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(mesh))
