"""What a run leaves in its work folder: checkpoints to resume from, and the product others load.

<workdir>/config.json      the resolved config and what the data was
<workdir>/checkpoints/     Orbax, written asynchronously; a partial write is never listed
<workdir>/starts.jsonl     each start: step, versions, commit, the settings that may change
<workdir>/parameters.txt   every parameter with its role, rates and place
<workdir>/metrics.jsonl    a line a logged step, and one a probe; the same for a resumed run
<workdir>/timing.jsonl     images/s and the share of time spent waiting for data
<workdir>/alarms.jsonl     what looked wrong
<workdir>/events.*         the same figures for TensorBoard
<workdir>/views.png        a few augmented crops of the first batch
<workdir>/product/         parameters that extract and export use
<workdir>/product.json     written last: name, step, sha256 of those parameters
<workdir>/best/            product/ and product.json of the step with the best probe
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, provenance, read_json, write_json
from pathme_jax.training.contract import Method, Params, flat, load_method, nested


def manager(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """Of the newest `keep` checkpoints. The loop decides when one is due."""
    return ocp.CheckpointManager(
        workdir.absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=keep)
    )


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Copies the state to the host; the write itself goes on in the background.

    Raises:
        UserError: this write, or the one before it, failed.
    """
    with _writing(checkpoints):
        checkpoints.save(step, args=ocp.args.StandardSave(state), force=True)


def finish(checkpoints: ocp.CheckpointManager) -> None:
    """Waits for the background write.

    Raises:
        UserError: it failed.
    """
    with _writing(checkpoints):
        checkpoints.wait_until_finished()


@contextlib.contextmanager
def _writing(checkpoints: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds
        saved = checkpoints.all_steps()
        raise UserError(
            f"{checkpoints.directory}: a checkpoint could not be written ({_line(error)})",
            f"The last good one is that of step {max(saved) if saved else 'none'}. Free space or mend the"
            " disk, then run the same command",
        ) from error


def restore(checkpoints: ocp.CheckpointManager, like: Any) -> Any | None:
    """The newest state, placed as `like` (arrays or ShapeDtypeStructs with shardings), or None.

    Raises:
        UserError: the checkpoint is of another architecture, or damaged.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        return checkpoints.restore(step, args=ocp.args.StandardRestore(abstract))
    except (
        Exception
    ) as error:  # Orbax raises many kinds; every one means this checkpoint is unusable
        raise UserError(
            f"{checkpoints.directory}/{step} cannot be restored into this model ({_line(error)})",
            "Delete that step's folder to go on from the one before, or use another --workdir",
        ) from error


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


def fingerprint(params: Params) -> str:
    """sha256 over names, shapes, types and values."""
    digest = hashlib.sha256()
    for path, value in sorted(flat(params).items()):
        value = np.asarray(value)
        digest.update(f"{path} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def write_product(
    workdir: Path, name: str, params: Params, *, step: int, identity: dict[str, Any], **more: Any
) -> None:
    """params: on the host, whole. Called by one process only. more: further entries of product.json."""
    (workdir / "product.json").unlink(missing_ok=True)  # no old name over new parameters
    with atomic(workdir / "product") as temporary, _checkpointer() as checkpointer:
        checkpointer.save(temporary.absolute(), params)
    sha = fingerprint(params)
    write_json(
        workdir / "product.json",
        {
            **more,
            "name": f"{name}-{sha[:8]}",
            "sha256": sha,
            "step": step,
            "identity": identity,
            "shapes": {path: [*x.shape, str(x.dtype)] for path, x in flat(params).items()},
            "provenance": provenance(),
        },
    )


def _checkpointer() -> ocp.StandardCheckpointer:
    """One that waits for no other process."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def load_product(
    workdir: str | Path, dtype: str | None = None
) -> tuple[str, Method, Params, dict[str, Any]]:
    """(name, method, parameters, product.json) of a finished training run, or of its folder "best".

    dtype: to compute in, instead of config.model.dtype.

    Raises:
        UserError: no product there, or one whose parameters are not those it was written with.
    """
    workdir = Path(workdir)
    if not (workdir / "product.json").exists():
        raise UserError(
            f"{workdir}: no finished training run here",
            "Run `python -m pathme_jax.train` with this --workdir until it ends",
        )
    about = read_json(workdir / "product.json")
    home = workdir if (workdir / "config.json").exists() else workdir.parent
    run = read_json(home / "config.json")
    config = run["config"]
    about |= {"made_from": run.get("made_from", []), "config": config}
    if dtype and "dtype" in config.get("model", {}):
        config["model"]["dtype"] = dtype
    method = load_method(ConfigDict(config))
    like = nested(
        {p: jax.ShapeDtypeStruct(tuple(s), np.dtype(t)) for p, (*s, t) in about["shapes"].items()}
    )
    try:
        with _checkpointer() as checkpointer:
            params = checkpointer.restore((workdir / "product").absolute(), like)
    except Exception as error:  # as in `restore`
        raise UserError(
            f"{workdir}/product cannot be read ({_line(error)})",
            f"Delete {workdir}/product.json and rerun the training command",
        ) from error
    params = jax.tree.map(np.asarray, params)
    if fingerprint(params) != about["sha256"]:
        raise UserError(
            f"{workdir}/product: parameters differ from those product.json describes",
            f"Delete {workdir}/product.json and rerun the training command",
        )
    return about["name"], method, params, about
