"""The work folder of a run: whose it is, one run at a time, and what it was started with."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, provenance, write_json
from pathme_jax.training import cost, initial
from pathme_jax.training.contract import Config, flat
from pathme_jax.training.step import Plan

# Keys of a config that say how a run is carried out, not what it computes.
OPERATIONAL = ("log_every", "checkpoint", "data", "mesh", "sharding", "probe", "profile", "initial")
OPERATIONAL_OF_MODEL = ("remat", "unroll", "attention")


def identity(config: Config, source: Any, starts_from: Mapping[str, str]) -> dict[str, Any]:
    """What decides the result: the config without its operational keys, the data, the first weights.

    Data and weights are named by the hash of their content, not by where they lie.
    """
    what = {k: v for k, v in json.loads(config.to_json()).items() if k not in OPERATIONAL}
    for key in OPERATIONAL_OF_MODEL:
        what.get("model", {}).pop(key, None)
    more = {"initial": dict(starts_from)} if starts_from else {}
    return {"config": what, "data": repr(source), **more}


def refuse_other(workdir: Path, before: Mapping[str, Any], what: Mapping[str, Any]) -> None:
    """Refuses a folder that another run already uses."""
    if digest(before) != digest(what):
        old, new = flat(_plain(before)), flat(_plain(what))
        differ = sorted(k for k in old | new if old.get(k) != new.get(k))
        shown = ", ".join(f"{k}: {old.get(k)} then, {new.get(k)} now" for k in differ[:3])
        raise UserError(
            f"{workdir} holds a run of another recipe ({shown}{' …' if differ[3:] else ''})",
            "Use another --workdir, or the old settings to go on with that run",
        )


def claim(workdir: Path, config: Config, what: Mapping[str, Any]) -> None:
    """Writes config.json, once: from here on the folder is this run's."""
    if not (workdir / "config.json").exists():
        about = {"config": json.loads(config.to_json()), "identity": what}
        about |= {"made_from": initial.made_from(config), "provenance": provenance()}
        write_json(workdir / "config.json", about)


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Refuses a folder another run is working in; the lock goes with the process, however it ends."""
    if jax.process_index():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{workdir}: another process is training here",
                "Wait for it or stop it; processes of one run need --coordinator",
            ) from None
        yield


def tell_start(workdir: Path, config: Config, plan: Plan, first: int) -> None:
    """What this process runs with: it may be other code, or another mesh, than before."""
    settings = {k: v for k, v in json.loads(config.to_json()).items() if k in OPERATIONAL}
    mesh = {name: int(size) for name, size in plan.mesh.shape.items()}
    row = {"step": first, "mesh": mesh, "settings": settings, **provenance()}
    with open(workdir / "starts.jsonl", "a") as file:
        file.write(json.dumps(row, default=str) + "\n")
    with atomic(workdir / "parameters.txt") as temporary:
        temporary.write_text(cost.table(plan.table) + "\n")


def _plain(tree: Any) -> dict[str, Any]:
    """As it comes back from a file; empty branches become None, which `flat` keeps."""
    return json.loads(json.dumps(tree), object_hook=lambda d: d or None)
