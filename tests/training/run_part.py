"""Part of a training run on fake devices, for test_resume.py: kills itself right after a checkpoint.

python run_part.py CONFIG.json WORKDIR DEVICES WORKERS STOP_AFTER
"""

from __future__ import annotations

import json
import os
import signal
import sys

import jax
from ml_collections import ConfigDict


def main(config: str, workdir: str, devices: str, workers: str, stop_after: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))

    from pathme_jax.training import checkpoints, loop

    save = checkpoints.save

    def save_and_die(manager, step, state):
        save(manager, step, state)
        if step == int(stop_after):
            checkpoints.finish(manager)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save = save_and_die
    with open(config) as file:
        settings = ConfigDict(json.load(file))
    settings.data.workers = int(workers)
    loop.train(settings, workdir, progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
