"""What DINOv2 of ViT-L/16 and ViT-g/14 would cost on 8 to 4,096 H100s. Nothing is run or measured here.

    python benchmarks/scaling.py                                     # arithmetic: tables 1 to 4 of docs/scaling.md
    python benchmarks/scaling.py --compile L/16 --devices 8 --fsdp 8 # one line of table 5, on fake CPU devices

The recipes are those of configs/dinov2.py. Parameters, FLOPs and the bytes of the state come from the
library's own method and sharding rules, activations from what its gradient closes over; communication
and times from formulas that stand in this file; --compile asks XLA instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from configs.dinov2 import get_config
from pathme_jax.data import pipeline
from pathme_jax.training import cost
from pathme_jax.training.contract import load_method
from pathme_jax.training.sharding import AXES, make_mesh
from pathme_jax.training.step import Plan, make_plan

DEVICES = (8, 64, 512, 4096)
PER_DEVICE = {"L/16": 64, "g/14": 16}  # images a device a step
GIB = 2**30

# One H100 SXM: dense bf16 peak and the share of it that large matrix products reach in practice; bytes a
# second to the 7 others of its node (NVLink), and to other nodes (one 400 Gb/s port a GPU).
PEAK, MFU, NODE = 989e12, 0.40, 8
NVLINK, PORT = 450e9, 50e9


def recipe(variant: str, samples: int, remat: str) -> Any:
    config = get_config(variant)
    config.batch.samples = samples
    config.model.remat = remat
    return config


def plan(config: Any, mesh: Any) -> Plan:
    method = load_method(config)
    return make_plan(method, config, pipeline.shapes(None, method.batch_spec), mesh)


def abstract_mesh(devices: int, fsdp: int) -> Any:
    """A mesh without devices, for shapes and places alone."""
    return AbstractMesh((devices // fsdp, fsdp, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def kept_bytes(config: Any) -> int:
    """What the forward pass keeps for the backward pass: what `jax.vjp` closes over, weights apart.

    Exact for the code as JAX sees it; a compiler may still fuse some of it away. Gradients, the teacher's
    forward pass and whatever lives within one layer come on top.
    """
    method = load_method(config)
    batch = pipeline.shapes(None, method.batch_spec)

    def student_and_residuals(batch: Any) -> tuple[Any, Any]:
        key = jax.random.key(0)
        keys = jax.random.split(key, method.batch_spec.samples)
        params, aux = method.init(key, batch)
        views = method.views(batch, keys)

        def loss(student: Any) -> Any:
            step = jnp.zeros((), jnp.int32)
            return method.loss({**params, "student": student}, aux, views, keys, step)

        return params["student"], jax.vjp(loss, params["student"], has_aux=True)[1]

    student, residuals = jax.eval_shape(student_and_residuals, batch)
    weights = {(x.shape, x.dtype) for x in jax.tree.leaves(student)}
    leaves = [x for x in jax.tree.leaves(residuals) if (x.shape, x.dtype) not in weights]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


# ------------------------------------------------------------------------------------ communication


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of results a device a step, by the collective, and the seconds that they bind."""

    gather: float
    reduce: float
    scatter: float
    seconds: float


def traffic(parameters: int, devices: int, fsdp: int) -> Traffic:
    """What parameters and gradients cost; centres, KoLeo and metrics are smaller (see table 5).

    Copies ("replicate", fsdp = 1): one all-reduce of the gradient. Cut over `fsdp` devices: bf16 weights
    are gathered for the student's forward and backward pass and for the teacher's, the fp32 gradient is
    reduce-scattered, and all-reduced over the copies of the cut state, if there are several.
    """
    copies = devices // fsdp
    gather = 3 * 2 * parameters if fsdp > 1 else 0
    scatter = 4 * parameters / fsdp if fsdp > 1 else 0
    reduce = 4 * parameters / fsdp if copies > 1 else 0
    # Devices of the axis "fsdp" are neighbours; copies of one cut are `fsdp` devices apart.
    cut, copied = min(fsdp, NODE), min(copies, max(1, NODE // fsdp))
    seconds = (
        pass_seconds(gather, fsdp, cut)
        + pass_seconds(scatter * fsdp, fsdp, cut)  # moves what gathering its input would
        + 2 * pass_seconds(reduce, copies, copied)
    )
    return Traffic(gather, reduce, scatter, seconds)


def pass_seconds(size: float, group: int, local: int) -> float:
    """One pass of `size` bytes over `group` devices, `local` of them in each node.

    Inside a node every device takes in (local - 1) / local of it by NVLink. Between nodes each node takes
    in what the others hold, split over the ports of its `local` devices; both at once, so the longer.
    """
    nodes = group // local
    inside = size * (local - 1) / local / NVLINK
    between = size * (nodes - 1) / nodes / local / PORT
    return max(inside, between)


# ------------------------------------------------------------------------------------------- tables


def arithmetic() -> None:
    print("### Table 1. The models: from the library's own step, traced\n")
    print("| | parameters, student | of it heads | TFLOP an image | of it crops and colour |")
    print("|---|---|---|---|---|")
    known = {}
    for variant in PER_DEVICE:
        config = recipe(variant, 64, "none")
        made = plan(config, abstract_mesh(1, 1))
        sizes = {k: math.prod(v.shape) for k, v in made.state["trained"].items()}
        flops = cost.matmul_flops(made.step, made.state, made.batch) / 64
        keys = jax.random.split(jax.random.key(0), 64)
        crops = cost.matmul_flops(load_method(config).views, made.batch, keys) / 64
        known[variant] = sum(sizes.values()), flops
        heads = sum(v for k, v in sizes.items() if "/backbone/" not in k)
        print(
            f"| {variant} | {sum(sizes.values()) / 1e6:,.0f} M | {heads / 1e6:,.0f} M"
            f" | {flops / 1e12:.3f} | {crops / 1e12:.3f} |"
        )

    print("\n### Table 2. State a device, GiB: from the library's sharding rules\n")
    print("| | mesh | student | teacher | moments | total |")
    print("|---|---|---|---|---|---|")
    for variant in PER_DEVICE:
        for fsdp in (1, *DEVICES):
            made = plan(recipe(variant, fsdp * 8, "none"), abstract_mesh(fsdp, fsdp))
            state = {k: v / GIB for k, v in cost.state_bytes(made.state).items()}
            print(
                f"| {variant} | {mesh_name(fsdp, fsdp)} | {state['trained']:.3f}"
                f" | {state['ema']:.3f} | {state['opt']:.3f} | {sum(state.values()):.3f} |"
            )

    print("\n### Table 3. Kept for the backward pass, a device: from `jax.vjp`'s residuals\n")
    print("| | images a device | remat | kept, GiB | TFLOP an image |")
    print("|---|---|---|---|---|")
    for variant, images in PER_DEVICE.items():
        for remat in ("none", "dots", "full"):
            config = recipe(variant, images, remat)
            made = plan(config, abstract_mesh(1, 1))
            flops = cost.matmul_flops(made.step, made.state, made.batch) / images
            print(
                f"| {variant} | {images} | {remat} | {kept_bytes(config) / GIB:.1f}"
                f" | {flops / 1e12:.3f} |"
            )

    print("\n### Table 4. Predicted speed: formula, nothing measured\n")
    print(
        "| | devices | mesh | images a device | gathered, GiB | scattered, GiB | reduced, GiB"
        " | compute, ms | communication, ms | img/s/device, hidden to exposed | binds |"
    )
    print("|" + "---|" * 11)
    for variant, devices, fsdp, images in cases():
        parameters, flops = known[variant]
        moved = traffic(parameters, devices, fsdp)
        compute = images * flops / (PEAK * MFU)
        hidden, exposed = max(compute, moved.seconds), compute + moved.seconds
        print(
            f"| {variant} | {devices:,} | {mesh_name(devices, fsdp)} | {images:g}"
            f" | {moved.gather / GIB:.2f} | {moved.scatter / GIB:.3f} | {moved.reduce / GIB:.2f}"
            f" | {compute * 1e3:.0f} | {moved.seconds * 1e3:.1f}"
            f" | {images / hidden:,.0f} to {images / exposed:,.0f}"
            f" | {'compute' if compute >= moved.seconds else 'communication'} |"
        )


def cases() -> list[tuple[str, int, int, int]]:
    """(variant, devices, fsdp, images a device): copies, cut over a node, cut over everything.

    A device's usual share first; then, where that is more, the share of a batch of 4,096.
    """
    return [
        (variant, devices, fsdp, images)
        for variant, usual in PER_DEVICE.items()
        for devices in DEVICES
        for images in sorted({usual, min(usual, 4096 // devices)}, reverse=True)
        for fsdp in sorted({1, NODE, devices})
    ]


def mesh_name(devices: int, fsdp: int) -> str:
    if fsdp == 1:
        return "replicate"
    return f"fsdp {fsdp}" + (f" x data {devices // fsdp}" if devices > fsdp else "")


# ---------------------------------------------------------------------------------------- compilation


def compiled(variant: str, devices: int, fsdp: int, remat: str) -> None:
    """One line of table 5."""
    jax.config.update("jax_num_cpu_devices", devices)
    config = recipe(variant, devices * PER_DEVICE[variant], remat)
    mesh: Mesh = make_mesh({"data": -1, "fsdp": fsdp})
    made = plan(config, mesh)
    start = time.perf_counter()
    lowered = made.step.lower(made.state, made.batch)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    planned, moved = cost.memory(program), cost.collectives(program)
    kinds = "; ".join(f"{k} {x['count']} x, {x['bytes'] / GIB:.2f}" for k, x in moved.items())
    print(
        f"| {variant} | {devices:,} | {mesh_name(devices, fsdp)} | {remat} | {traced - start:.0f}"
        f" | {done - traced:.0f} | {planned['argument'] / GIB:.2f} | {planned['temp'] / GIB:.1f}"
        f" | {kinds} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What DINOv2 would cost on many devices.")
    parser.add_argument("--compile", choices=list(PER_DEVICE), metavar="VARIANT")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--fsdp", type=int, default=8)
    parser.add_argument("--remat", default="none")
    arguments = parser.parse_args()
    if arguments.compile:
        compiled(arguments.compile, arguments.devices, arguments.fsdp, arguments.remat)
    else:
        arithmetic()


if __name__ == "__main__":
    main()
