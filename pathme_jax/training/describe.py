"""What a run costs, from its compiled program: in a few lines at its start, in full by `train --dry-run`."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from pathme_jax.data import pipeline
from pathme_jax.training import cost
from pathme_jax.training.contract import Config, load_method
from pathme_jax.training.sharding import make_mesh
from pathme_jax.training.step import Plan, make_plan


def describe(config: Config) -> str:
    """Parameters with their roles, rates and places; FLOPs, memory and communication a device."""
    method = load_method(config)
    spec = method.batch_spec
    # Fields have known shapes; regions are as wide as their features, so their data must be there.
    source = None if spec.record == "fields" else pipeline.open_source(config.data.path, spec)
    plan = make_plan(method, config, pipeline.shapes(source, spec), make_mesh(config.get("mesh")))
    compiled = plan.step.lower(plan.state, plan.batch).compile()
    state = cost.state_bytes(plan.state)
    moved = cost.collectives(compiled)
    lines = [
        f"{config.method}, {config.steps} steps of {spec.samples} samples",
        cost.table(plan.table),
        *(f"batch {name}: {x.shape} {x.dtype}" for name, x in plan.batch.items()),
        *summary(plan, compiled, model_flops(plan, config), config),
        "state a device: " + ", ".join(f"{k} {_mib(v)}" for k, v in state.items() if v),
        *(
            f"{kind} a step a device: {x['count']} x, {_mib(x['bytes'])}"
            for kind, x in moved.items()
        ),
    ]
    return "\n".join(lines if moved else [*lines, "no communication between devices"])


def summary(plan: Plan, compiled: Any, flops: int, config: Config) -> list[str]:
    """Size, memory and work of a step, and what about the config is probably not meant."""
    trained = sum(int(np.prod(x.shape)) for x in plan.state["trained"].values())
    used = cost.memory(compiled)
    total = used["argument"] + used["output"] - used["alias"] + used["temp"]
    samples = next(iter(plan.batch.values())).shape[0]
    lines = [
        f"{trained:,} trained parameters on {plan.mesh.size} device(s) of mesh {dict(plan.mesh.shape)}",
        f"{flops / samples / 1e9:.4g} GFLOP a sample in matrix products, without recomputation",
        f"compiled program a device: {_mib(total)}, of it {_mib(used['temp'])} temporary"
        " (as this backend plans them)",
    ]
    block = (config.get("batch") or {}).get("block", 1)
    if plan.mesh.size > 1 and samples // plan.mesh.size % block:
        lines.append(
            f"note: {samples // plan.mesh.size} samples a device cut logical blocks of {block}, which makes"
            " devices exchange activations; lower config.batch.block or use more samples a device"
        )
    if config.optimiser.warmup > config.steps > 0:
        lines.append(
            f"note: config.optimiser.warmup = {config.optimiser.warmup} is longer than the run of"
            f" {config.steps} steps"
        )
    return lines


def model_flops(plan: Plan, config: Config) -> int:
    """Matrix products of a step over all devices, without what rematerialisation computes again.

    MFU is counted by them (Chowdhery 2022, appendix B): computing again is no progress.
    """
    if (config.get("model") or {}).get("remat", "none") != "none":
        config = copy.deepcopy(config)
        config.model.remat = "none"
        plan = make_plan(load_method(config), config, plan.batch, plan.mesh)
    return cost.matmul_flops(plan.step, plan.state, plan.batch)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
