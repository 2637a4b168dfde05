"""Trains one method.

    python -m pathme_jax.train --config configs/dinov2_tiny.py --workdir runs/dinov2 \\
        --config.data.path=OUT/20x-… [--config.steps=500]
    python -m pathme_jax.train --config configs/dinov2.py:L/16 --dry-run --devices 8

Rerun the same command to resume. SIGTERM saves and exits with 143 (as for any process that SIGTERM ends,
so that a scheduler does not take the run for finished). Several processes: start the same command in each,
with `--coordinator` (docs/launching.md).
"""

from __future__ import annotations

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from pathme_jax.errors import UserError, launcher

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py[:variant]", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "where checkpoints, metrics and the product go")
_DRY_RUN = flags.DEFINE_bool(
    "dry-run", False, "print parameters, FLOPs, memory and communication; train nothing"
)
_DEVICES = flags.DEFINE_integer("devices", None, "with --dry-run: on so many fake CPU devices")
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    'several processes: HOST:PORT of process 0, or "auto" where SLURM, MPI, GKE or a TPU pod says it',
)
_PROCESSES = flags.DEFINE_integer("processes", None, "how many, with --coordinator HOST:PORT")
_PROCESS = flags.DEFINE_integer("process", None, "which one this is, from 0")


@launcher
def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every step of every save
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {argv[1:]}", "See --help")
    if _DRY_RUN.value:
        _fake(_DEVICES.value)
        from pathme_jax.training.describe import describe

        print(describe(_CONFIG.value))
        return
    if _WORKDIR.value is None:
        raise UserError("no --workdir", "Give the folder for this run, or --dry-run")
    _connect()
    from pathme_jax.training.loop import Stopped, train

    try:
        workdir = train(_CONFIG.value, _WORKDIR.value)
    except Stopped as stopped:
        print(f"{stopped}; run the same command to go on")
        sys.exit(143)
    print(f"product: {workdir / 'product'}")


def _fake(devices: int | None) -> None:
    if devices is None:
        return
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def _connect() -> None:
    """Joins the processes of a run before JAX looks for devices."""
    if _COORDINATOR.value is None:
        if _PROCESSES.value is not None or _PROCESS.value is not None:
            raise UserError("--processes without --coordinator", "Give --coordinator HOST:PORT too")
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise UserError(
                "several SLURM tasks without --coordinator would each train alone",
                "Add --coordinator auto",
            )
        return
    import jax

    try:
        if _COORDINATOR.value == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(
                _COORDINATOR.value, num_processes=_PROCESSES.value, process_id=_PROCESS.value
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes could not be joined ({str(error).splitlines()[0]})",
            "Give --coordinator HOST:PORT --processes N --process I, the same host, port and N in each",
        ) from error


@launcher
def parse(argv: list[str]) -> list[str]:
    """Flags, with what is wrong with them in one line."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # often the bare key, or the one that was meant
        said = " ".join(str(error).split()).strip("\"'")
        raise UserError(
            f"the config has no such key: {said}", "Config keys are those of the config file"
        ) from error
    except (flags.Error, TypeError, ValueError, OSError) as error:
        said = " ".join(str(error).replace("\\n", " ").split())
        raise UserError(said, "See --help; config keys are those of the config file") from error


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    app.run(main, flags_parser=parse)
