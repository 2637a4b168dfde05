"""The training state and the one jitted step every method shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pathme_jax.errors import UserError
from pathme_jax.training import optimiser
from pathme_jax.training.contract import (
    FROZEN,
    TRAINED,
    Config,
    EmaOf,
    Method,
    flat,
    nested,
    resolve,
)
from pathme_jax.training.keys import sample_keys, stream_key
from pathme_jax.training.sharding import DEFAULT, place

Array = jax.Array
State = dict[str, Any]  # {"trained", "ema", "frozen": flat dicts; "opt", "aux"; "step": int32}


def build(
    method: Method, config: Config, batch: Mapping[str, Any], mesh: Mesh
) -> tuple[State, Callable[[State, Mapping[str, Array]], tuple[State, dict[str, Array]]]]:
    """The initial state, placed on the mesh, and the step function (state is donated).

    batch: one batch, or its `jax.ShapeDtypeStruct`s.
    """
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
    key = stream_key(config.seed, "init")
    abstract, _ = jax.eval_shape(lambda: method.init(key, shapes))
    roles = resolve(method.roles, list(flat(abstract)), "role")
    trained = [p for p, (role, _) in roles.items() if role == TRAINED]
    frozen = [p for p, (role, _) in roles.items() if role == FROZEN]
    ema = {
        p: (role, match.expand(role.source))
        for p, (role, match) in roles.items()
        if isinstance(role, EmaOf)
    }
    for path, (_, source) in ema.items():
        if source not in trained:
            raise UserError(
                f"{path} follows {source}, which is not trained", "Check the method's roles"
            )
    init_opt, update = optimiser.make(config.optimiser, config.steps, trained)

    def init() -> State:
        params, aux = method.init(key, shapes)
        params = flat(params)
        # A teacher starts as its student, whatever the method's init drew for it.
        params |= {path: params[source] for path, (_, source) in ema.items()}
        weights = {p: params[p] for p in trained}
        return {
            "trained": weights,
            "ema": {p: params[p].astype(jnp.float32) for p in ema},
            "frozen": {p: params[p] for p in frozen},
            "opt": init_opt(weights),
            "aux": aux,
            "step": jnp.zeros((), jnp.int32),
        }

    rules = [(str(a), str(b)) for a, b in config.get("sharding", ())] or DEFAULT
    where = _shardings(jax.eval_shape(init), rules, mesh)
    state = jax.jit(init, out_shardings=where)()

    def step(state: State, batch: Mapping[str, Array]) -> tuple[State, dict[str, Array]]:
        now = state["step"]
        index = now.astype(jnp.uint32) * method.batch_spec.samples + jnp.arange(
            method.batch_spec.samples, dtype=jnp.uint32
        )
        views = method.views(batch, sample_keys(config.seed, "views", index))
        keys = sample_keys(config.seed, "loss", index)

        def loss(trained: dict[str, Array]) -> tuple[Array, Any]:
            params = nested({**state["frozen"], **state["ema"], **trained})
            return method.loss(params, state["aux"], views, keys, now)

        (value, (metrics, aux)), grads = jax.value_and_grad(loss, has_aux=True)(state["trained"])
        weights, opt, norms = update(grads, state["opt"], state["trained"], now)
        followed = {
            path: optax.incremental_update(
                weights[source].astype(jnp.float32), state["ema"][path], 1 - role.momentum(now)
            )
            for path, (role, source) in ema.items()
        }
        state = {
            **state,
            "trained": weights,
            "ema": followed,
            "opt": opt,
            "aux": aux,
            "step": now + 1,
        }
        return state, {"loss": value, **metrics, **norms}

    data = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(
        step,
        in_shardings=(where, {k: data for k in batch}),
        out_shardings=(where, whole),
        donate_argnums=0,
    )
    return state, compiled


def params_of(state: State) -> dict[str, Any]:
    """The method's nested parameters."""
    return nested({**state["frozen"], **state["ema"], **state["trained"]})


def saved_part(state: State) -> State:
    """What a checkpoint holds: everything but the frozen parameters, which have their own source."""
    return {k: v for k, v in state.items() if k != "frozen"}


def _shardings(shapes: Any, rules: Any, mesh: Mesh) -> Any:
    """Parameters by rule; each Adam moment where its parameter is; the rest replicated."""
    whole = NamedSharding(mesh, PartitionSpec())
    placed = {}
    for part in ("trained", "ema", "frozen"):
        placed |= place(shapes[part], rules, mesh) if shapes[part] else {}

    def where(path: Any, _: Any) -> NamedSharding:
        names = [p.key for p in path if isinstance(p, jax.tree_util.DictKey)]
        return placed.get(names[-1], whole) if names else whole

    return jax.tree_util.tree_map_with_path(where, shapes)
