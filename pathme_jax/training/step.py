"""The training state and the one jitted step every method shares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from pathme_jax.training.sharding import DEFAULT, SAMPLES, place

Array = jax.Array
State = dict[str, Any]  # {"trained", "ema", "frozen": flat dicts; "opt", "aux"; "step": int32}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that has not started: nothing is allocated, everything has its shape and place.

    Attributes:
        state: `State` of `jax.ShapeDtypeStruct` with shardings.
        batch: the same for a batch.
        init: () to the first state, made in its shards.
        step: (state, batch) to (state, metrics), jitted; the state is donated.
        follows: path of an EMA parameter to the path it follows.
        table: one row a parameter, for `cost.table`.
    """

    mesh: Mesh
    state: State
    batch: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[], State]
    step: Any
    follows: dict[str, str]
    table: list[dict[str, Any]]


def make_plan(method: Method, config: Config, batch: Mapping[str, Any], mesh: Mesh) -> Plan:
    """batch: arrays of one global batch, or their `jax.ShapeDtypeStruct`s.

    Raises:
        UserError: a parameter no rule covers, an EMA of something untrained, a batch that does not divide.
    """
    samples = method.batch_spec.samples
    if samples % mesh.size:
        raise UserError(
            f"{samples} samples a batch do not divide over {mesh.size} devices",
            "Change config.batch.samples",
        )
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
    key = stream_key(config.seed, "init")
    abstract = flat(jax.eval_shape(lambda: method.init(key, shapes))[0])
    roles = resolve(method.roles, list(abstract), "role")
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
    init_opt, update = optimiser.make(
        config.optimiser, config.steps, {p: abstract[p] for p in trained}, samples
    )

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

    def step(state: State, batch: Mapping[str, Array]) -> tuple[State, dict[str, Array]]:
        now = state["step"]
        index = now.astype(jnp.uint32) * samples + jnp.arange(samples, dtype=jnp.uint32)
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

    def step_on_mesh(state: State, batch: Mapping[str, Array]) -> tuple[State, dict[str, Array]]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for `sharding.spread`
            return step(state, batch)

    rules = [(str(a), str(b)) for a, b in config.get("sharding", ())] or DEFAULT
    state = jax.eval_shape(init)
    where = _shardings(state, rules, mesh)
    data = NamedSharding(mesh, SAMPLES)
    rates = optimiser.rates(config.optimiser, {p: abstract[p] for p in trained})
    table = [
        {
            "path": p,
            "shape": abstract[p].shape,
            "role": _part(role),
            **rates.get(p, {}),
            "sharding": str(where[_part(role)][p].spec),
        }
        for p, (role, _) in roles.items()
    ]
    return Plan(
        mesh=mesh,
        state=jax.tree.map(_placed, state, where),
        batch={k: _placed(v, data) for k, v in shapes.items()},
        init=jax.jit(init, out_shardings=where),
        step=jax.jit(
            step_on_mesh,
            in_shardings=(where, dict.fromkeys(shapes, data)),
            out_shardings=(where, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
        ),
        follows={path: source for path, (_, source) in ema.items()},
        table=table,
    )


def build(
    method: Method, config: Config, batch: Mapping[str, Any], mesh: Mesh
) -> tuple[State, Callable[[State, Mapping[str, Array]], tuple[State, dict[str, Array]]]]:
    """The first state and the step of a plan."""
    plan = make_plan(method, config, batch, mesh)
    return plan.init(), plan.step


def params_of(state: State) -> dict[str, Any]:
    """The method's nested parameters."""
    return nested({**state["frozen"], **state["ema"], **state["trained"]})


def saved_part(state: State) -> State:
    """What a checkpoint holds: everything but the frozen parameters, which have their own source."""
    return {k: v for k, v in state.items() if k != "frozen"}


def on_host(tree: Any, mesh: Mesh) -> Any:
    """Sharded arrays as whole NumPy arrays, on every process, one array at a time."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: np.asarray(_gather(mesh)(x)), tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _part(role: Any) -> str:
    return role if isinstance(role, str) else "ema"


def _placed(shape: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


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
