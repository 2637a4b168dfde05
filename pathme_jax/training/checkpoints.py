"""What a run leaves in its work folder: checkpoints to resume from, and the product others load.

<workdir>/config.json      the resolved config and what the data was
<workdir>/checkpoints/     Orbax, written asynchronously; a partial write is never listed
<workdir>/metrics.jsonl    one line a logged step; the same for a resumed run
<workdir>/timing.jsonl     images/s and the share of time spent waiting for data
<workdir>/product/         parameters that extract and export use
<workdir>/product.json     written last: name, step, sha256 of those parameters
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, provenance, read_json, write_json
from pathme_jax.training.contract import Method, Params, flat, load_method, nested


def manager(workdir: Path, every: int, keep: int) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        workdir.absolute() / "checkpoints",
        options=ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep),
    )


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
            f"{checkpoints.directory}/{step} cannot be restored into this model"
            f" ({str(error).splitlines()[0][:200]})",
            "Delete that step's folder to go on from the one before, or use another --workdir",
        ) from error


def fingerprint(params: Params) -> str:
    """sha256 over names, shapes, types and values."""
    digest = hashlib.sha256()
    for path, value in sorted(flat(params).items()):
        value = np.asarray(value)
        digest.update(f"{path} {value.shape} {value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def write_product(workdir: Path, params: Params, *, step: int, identity: dict[str, Any]) -> None:
    params = jax.tree.map(np.asarray, params)
    with atomic(workdir / "product") as temporary, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(temporary.absolute(), params)
    sha = fingerprint(params)
    write_json(
        workdir / "product.json",
        {
            "name": f"{workdir.name}-{sha[:8]}",
            "sha256": sha,
            "step": step,
            "identity": identity,
            "shapes": {path: [*x.shape, str(x.dtype)] for path, x in flat(params).items()},
            "provenance": provenance(),
        },
    )


def load_product(workdir: str | Path) -> tuple[str, Method, Params]:
    """(name, method, parameters) of a finished training run.

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
    method = load_method(ConfigDict(read_json(workdir / "config.json")["config"]))
    like = nested(
        {p: jax.ShapeDtypeStruct(tuple(s), np.dtype(t)) for p, (*s, t) in about["shapes"].items()}
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore((workdir / "product").absolute(), like)
    except Exception as error:  # as in `restore`
        raise UserError(
            f"{workdir}/product cannot be read ({str(error).splitlines()[0][:200]})",
            f"Delete {workdir}/product.json and rerun the training command",
        ) from error
    params = jax.tree.map(np.asarray, params)
    if fingerprint(params) != about["sha256"]:
        raise UserError(
            f"{workdir}/product: parameters differ from those product.json describes",
            f"Delete {workdir}/product.json and rerun the training command",
        )
    return about["name"], method, params
