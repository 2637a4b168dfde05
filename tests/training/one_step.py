"""One DINOv2 step on fake devices, for test_step.py: what must not depend on how many there are.

python one_step.py DEVICES MESH OUT.npz [PROCESSES PROCESS PORT]
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np


def main(devices: str, mesh: str, out: str, *rest: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    if rest:
        processes, process, port = map(int, rest)
        jax.distributed.initialize(f"localhost:{port}", processes, process)

    from configs.dinov2_tiny import get_config
    from pathme_jax.data.device import rows_of
    from pathme_jax.training.contract import load_method
    from pathme_jax.training.sharding import make_mesh
    from pathme_jax.training.step import make_plan, on_host

    config = get_config("test")
    config.mesh = json.loads(mesh)
    config.sharding = ((".*/prototypes", "prototypes"), (".*", "fsdp"))
    config.optimiser.warmup = 0
    config.loss.drop_path = 0.25
    config.loss.kde = 0.1
    config.model.layer_scale = 1.0
    config.batch.block = 2
    rng = np.random.default_rng(0)
    batch = {
        "window": rng.integers(0, 255, (16, 128, 128, 3)).astype(np.uint8),
        "mpp": np.ones(16, np.float32),
    }
    plan = make_plan(load_method(config), config, batch, make_mesh(config.mesh))
    where = plan.batch["window"].sharding
    ((start, stop),) = rows_of(where, 16)
    batch = {
        k: jax.make_array_from_process_local_data(where, v[start:stop], v.shape)
        for k, v in batch.items()
    }
    state, metrics = plan.step(plan.init(), batch)
    kept = {
        "loss": metrics["loss"],
        "centre": state["aux"]["dino"],
        # the first moment after one step is 0.1 x the clipped gradient
        **{f"grad/{k}": v for k, v in state["opt"].mu.items()},
    }
    kept = on_host(kept, plan.mesh)
    cut = [k for k, v in state["trained"].items() if not v.sharding.is_fully_replicated]
    if jax.process_index() == 0:
        np.savez(out, devices=jax.device_count(), processes=jax.process_count(), cut=cut, **kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
