"""What a run would cost, from its compiled program, without starting it: `train --dry-run`."""

from __future__ import annotations

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
    flops = cost.matmul_flops(plan.step, plan.state, plan.batch)
    return "\n".join(
        [
            f"{config.method}, {config.steps} steps of {spec.samples} samples",
            cost.table(plan.table),
            *(f"batch {name}: {x.shape} {x.dtype}" for name, x in plan.batch.items()),
            *_costs(plan, compiled, flops / spec.samples),
        ]
    )


def _costs(plan: Plan, compiled: object, flops: float) -> list[str]:
    state, used = cost.state_bytes(plan.state), cost.memory(compiled)
    total = used["argument"] + used["output"] - used["alias"] + used["temp"]
    lines = [
        f"mesh: {dict(plan.mesh.shape)}, {plan.mesh.size} device(s)",
        f"{flops / 1e9:.4g} GFLOP a sample in matrix products (student, teacher, heads, crops)",
        "state a device: " + ", ".join(f"{k} {_mib(v)}" for k, v in state.items() if v),
        f"compiled program a device: {_mib(total)}, of it {_mib(used['temp'])} temporary"
        f" (as this backend plans them)",
    ]
    moved = cost.collectives(compiled)
    lines += [
        f"{kind} a step a device: {x['count']} x, {_mib(x['bytes'])}" for kind, x in moved.items()
    ]
    return lines if moved else [*lines, "no communication between devices"]


def _mib(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
