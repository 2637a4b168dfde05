"""One slide of 200,000 instances trains: seconds, memory, and what spreading its instances over devices saves.

    python benchmarks/large_bag.py [--heads abmil,clam_mb,dsmil,transmil] [--instances 200000] [--width 1024]

Trains each head for two steps on one device, for real. Then compiles the same step for 1, 2, 4 and 8 fake devices that
share the bag's instances, and prints the bytes the compiler plans for each of them; that part computes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np


def train(name: str, instances: int, width: int) -> str:
    """Two epochs of one member on one bag; run in a process of its own, so that its peak memory is its own."""
    from pathme_jax.mil import buckets, population
    from pathme_jax.mil.folds import TRAIN
    from pathme_jax.mil.heads import make
    from pathme_jax.mil.tasks import Task, Tasks

    rng = np.random.default_rng(0)
    bag = rng.standard_normal((instances, width), np.float32)
    side = int(np.ceil(instances**0.5))
    cells = np.stack(np.divmod(np.arange(instances), side), 1).astype(np.int32)
    members = population.Members(
        np.array([[TRAIN]]), np.ones((1, 1, 1), np.float32), np.ones((1, 1, 1)),
        np.zeros(1, int), np.full(1, 1e-3), np.zeros(1),
    )  # fmt: skip
    head = make(name, 2, dict(hidden=512, attention=128, dropout=0.0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started = time.perf_counter()
    found = population.fit(
        head,
        Tasks((Task("y", "classes", ("0", "1")),)),
        buckets.pack([bag], [cells]),
        members,
        population.Schedule(2),
        progress=False,
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    losses = ", ".join(f"{loss:.3f}" for loss in found.losses[:, 0])
    return f"{seconds:.0f} s with compilation, losses {losses}, peak {peak:.1f} GB ({before:.1f} before)"


def planned(name: str, instances: int, width: int) -> str:
    """GB a device of the compiled step, all devices of this process sharing one bag."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from pathme_jax.mil import population
    from pathme_jax.mil.heads import make
    from pathme_jax.mil.heads.common import Bag
    from pathme_jax.mil.tasks import Task, Tasks

    devices = jax.device_count()
    mesh = population.mesh_of(devices)
    m = -(-instances // devices) * devices
    head = make(name, 2, dict(hidden=512, attention=128, dropout=0.0))
    tasks = Tasks((Task("y", "classes", ("0", "1")),))

    def like(tree, spec):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree
        )  # fmt: skip

    state = jax.eval_shape(population._starts(head, width), jnp.zeros(1, int))
    f32, i32 = jnp.float32, jnp.int32
    shape = jax.ShapeDtypeStruct
    stacked = Bag(shape((1, m, width), f32), shape((1, m), bool), shape((1, m, 2), i32))  # pyright: ignore[reportArgumentType]
    fixed = {
        "mean": shape((1, width), f32),
        "std": shape((1, width), f32),
        "decay": shape((1,), f32),
    }
    plan = {"targets": shape((1, 1, 1, 1), f32), "weights": shape((1, 1, 1, 1), f32)}
    plan |= {"rate": shape((1, 1), f32), "active": shape((1, 1), i32)}
    common = {"places": shape((1, 1), i32), "real": shape((1,), bool), "step": shape((1,), i32)}
    each, steps, everywhere = population.EACH, population.STEPS, population.ALL
    run = population._compiled(
        population._run, mesh, (head, tasks, 1),
        (each, each, everywhere, everywhere, steps, everywhere), (each, steps),
    )  # fmt: skip
    key = jax.eval_shape(lambda: jax.random.key(0))
    analysis = run.lower(
        like(state, each), like(fixed, each), like(key, everywhere), like(stacked, population.BAGS),
        like(plan, steps), like(common, everywhere),
    ).compile().memory_analysis()  # fmt: skip
    used = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
    return f"{used / 2**30:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--heads", default="abmil,clam_mb,dsmil,transmil")
    parser.add_argument("--instances", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument(
        "--part", default="", help="of the benchmark itself: run one in this process"
    )
    args = parser.parse_args()
    if args.part:
        part = {"train": train, "planned": planned}[args.part]
        print(json.dumps(part(args.heads, args.instances, args.width)))
        return

    def outside(part: str, name: str, devices: str) -> str:
        flags = f"--xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, __file__, "--part", part, "--heads", name, "--instances",
             str(args.instances), "--width", str(args.width)],
            env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True,
        )  # fmt: skip
        return (
            json.loads(done.stdout.splitlines()[-1]) if not done.returncode else done.stderr[-300:]
        )

    print(
        f"one bag of {args.instances:,} x {args.width}, {args.instances * args.width * 4 / 2**30:.2f} GB"
    )
    for name in args.heads.split(","):
        print(f"{name}: {outside('train', name, '1')}", flush=True)
        found = [outside("planned", name, devices) for devices in args.devices.split(",")]
        print(f"  GB a device on {args.devices} devices: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
