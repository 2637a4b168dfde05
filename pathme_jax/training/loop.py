"""The training loop: data, step, log, checkpoint. The order of the phases matters to exact resume."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from pathme_jax.data import pipeline
from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, provenance, read_json, write_json
from pathme_jax.training import checkpoints
from pathme_jax.training.contract import Config, flat, load_method
from pathme_jax.training.sharding import make_mesh
from pathme_jax.training.step import build, params_of, saved_part

# Keys of a config that say how a run is carried out, not what it computes.
OPERATIONAL = ("log_every", "checkpoint", "data")


def identity(config: Config, source: Any) -> dict[str, Any]:
    """What decides the result: the config without its operational keys, and the data.

    The source's repr names its content by hash, not where it lies.
    """
    what = {k: v for k, v in json.loads(config.to_json()).items() if k not in OPERATIONAL}
    return {"config": what, "data": repr(source)}


def train(config: Config, workdir: str | Path, *, progress: bool = True) -> Path:
    """Trains `config.method` to `config.steps` steps in `workdir`, resuming what is there.

    Returns:
        The work folder, whose `product.json` is written last.

    Raises:
        UserError: the folder holds another run; the data is missing or of another kind; the loss is
            not finite.
    """
    workdir = Path(workdir)
    method = load_method(config)
    spec = method.batch_spec
    source = pipeline.open_source(config.data.path, spec)
    what = identity(config, source)
    _claim(workdir, config, what)
    if (workdir / "product.json").exists():
        return workdir

    mesh = make_mesh()
    if spec.samples % mesh.size:
        raise UserError(
            f"{spec.samples} samples a batch do not divide over {mesh.size} devices",
            "Change config.batch.samples",
        )
    example = next(pipeline.batches(config.data.path, spec, seed=config.seed))
    state, step_function = build(method, config, example, mesh)
    saver = checkpoints.manager(workdir, config.checkpoint.every, config.checkpoint.keep)
    restored = checkpoints.restore(saver, saved_part(state))
    if restored is not None:
        state = {**state, **restored}
    first = int(state["step"])
    if progress:
        count = sum(int(np.prod(x.shape)) for x in state["trained"].values())
        print(f"{config.method}: {count:,} trained parameters, from step {first} of {config.steps}")

    batches = pipeline.batches(
        config.data.path, spec, seed=config.seed, first_batch=first, workers=config.data.workers
    )
    log = _Log(workdir, first)
    where = NamedSharding(mesh, PartitionSpec("data"))
    bar = tqdm(total=config.steps, initial=first, disable=not progress, desc=workdir.name)
    try:
        for step in range(first, config.steps):
            started = time.perf_counter()
            batch = jax.device_put(dict(next(batches)), where)
            waited = time.perf_counter() - started
            state, metrics = step_function(state, batch)
            last = step + 1 == config.steps
            if step % config.log_every == 0 or last:
                values = {k: float(v) for k, v in metrics.items()}
                _must_be_finite(values, step, workdir)
                log.write(step, values, waited, time.perf_counter() - started, spec.samples)
                bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
            saver.save(
                step + 1, args=checkpoints.ocp.args.StandardSave(saved_part(state)), force=last
            )
            bar.update()
        saver.wait_until_finished()
    finally:
        bar.close()
        saver.close()
    checkpoints.write_product(
        workdir, method.product(params_of(state)), step=config.steps, identity=what
    )
    return workdir


def describe(config: Config) -> str:
    """Parameters by role, the batch, and what the compiled step costs. Trains nothing."""
    method = load_method(config)
    example = next(pipeline.batches(config.data.path, method.batch_spec, seed=config.seed))
    state, step_function = build(method, config, example, make_mesh())
    compiled = step_function.lower(state, example).compile()
    lines = [f"{config.method}, {config.steps} steps"]
    lines += [f"batch {name}: {value.shape} {value.dtype}" for name, value in example.items()]
    for part in ("trained", "ema", "frozen"):
        sizes = [int(np.prod(x.shape)) for x in state[part].values()]
        lines.append(f"{part}: {len(sizes)} arrays, {sum(sizes):,} parameters")
    memory = compiled.memory_analysis()
    if memory is not None:
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        lines.append(f"memory a device: {used / 2**20:.0f} MiB (arguments and temporaries)")
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
    lines.append(f"{flops / 1e9 / method.batch_spec.samples:.2f} GFLOP a sample")
    return "\n".join(lines)


def _claim(workdir: Path, config: Config, what: Mapping[str, Any]) -> None:
    """Writes config.json, or refuses a folder that another run already uses."""
    path = workdir / "config.json"
    if path.exists():
        before = read_json(path)["identity"]
        if digest(before) != digest(what):
            old, new = flat(_plain(before)), flat(_plain(what))
            differ = sorted(k for k in old | new if old.get(k) != new.get(k))
            shown = ", ".join(f"{k}: {old.get(k)} then, {new.get(k)} now" for k in differ[:3])
            raise UserError(
                f"{workdir} holds a run of another recipe ({shown}{' …' if differ[3:] else ''})",
                "Use another --workdir, or the old settings to go on with that run",
            )
        return
    write_json(
        path,
        {"config": json.loads(config.to_json()), "identity": what, "provenance": provenance()},
    )


def _plain(tree: Any) -> dict[str, Any]:
    """As it comes back from a file; empty branches become None, which `flat` keeps."""
    return json.loads(json.dumps(tree), object_hook=lambda d: d or None)


def _must_be_finite(values: Mapping[str, float], step: int, workdir: Path) -> None:
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise UserError(
            f"step {step}: {', '.join(bad)} not finite; the rest: "
            + ", ".join(f"{k} {v:.4g}" for k, v in values.items() if k not in bad),
            f"The last good checkpoint is kept in {workdir}/checkpoints. Lower config.optimiser.lr,"
            " lengthen its warm-up, or look for bad records",
        )


class _Log:
    """Two JSON-lines files. Lines after the step resumed from are dropped, so nothing is there twice."""

    def __init__(self, workdir: Path, first: int):
        self.metrics, self.timing = workdir / "metrics.jsonl", workdir / "timing.jsonl"
        for path in (self.metrics, self.timing):
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) < first]
            with atomic(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))

    def write(
        self, step: int, values: Mapping[str, float], waited: float, took: float, samples: int
    ) -> None:
        rates = {"samples_per_second": samples / took, "data_wait": waited / took}
        for path, row in ((self.metrics, values), (self.timing, rates)):
            with open(path, "a") as file:
                file.write(
                    json.dumps({"step": step, **{k: float(f"{v:.6g}") for k, v in row.items()}})
                )
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a line cut short by a kill
        return float("inf")
