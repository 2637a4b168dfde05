"""Trains one method.

    python -m pathme_jax.train --config configs/dinov2_tiny.py --workdir runs/dinov2 \\
        --config.data.path=OUT/20x-… [--config.steps=500] [--dry-run]

Rerun the same command to resume.
"""

from __future__ import annotations

from absl import app, flags
from ml_collections import config_flags

from pathme_jax.errors import UserError, launcher

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py[:variant]", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "where checkpoints, metrics and the product go")
_DRY_RUN = flags.DEFINE_bool("dry-run", False, "print parameters, memory and FLOPs; train nothing")


@launcher
def main(argv: list[str]) -> None:
    from pathme_jax.training.loop import describe, train

    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if _DRY_RUN.value:
        print(describe(_CONFIG.value))
        return
    assert _WORKDIR.value is not None  # marked as required below
    workdir = train(_CONFIG.value, _WORKDIR.value)
    print(f"product: {workdir / 'product'}")


@launcher
def parse(argv: list[str]) -> list[str]:
    """Flags, with what is wrong with them in one line."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        said = " ".join(str(error).replace("\\n", " ").split())
        raise UserError(said, "See --help; config keys are those of the config file") from error


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse)
