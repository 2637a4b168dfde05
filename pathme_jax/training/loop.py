"""The training loop: data, step, log, probe, checkpoint. The order of the phases matters to exact resume.

A run of several processes runs this same code in each; process 0 alone writes what is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from pathme_jax.data import pipeline
from pathme_jax.data.device import rows_of, to_device
from pathme_jax.errors import UserError
from pathme_jax.files import read_json
from pathme_jax.training import checkpoints, initial, watch
from pathme_jax.training.alarms import Alarms
from pathme_jax.training.contract import Config, Method, load_method
from pathme_jax.training.describe import model_flops, summary
from pathme_jax.training.keys import sample_keys
from pathme_jax.training.pictures import save_views
from pathme_jax.training.probe import Probing
from pathme_jax.training.sharding import make_mesh
from pathme_jax.training.speed import Speed, Trace, line
from pathme_jax.training.step import Plan, make_plan, on_host, params_of, saved_part
from pathme_jax.training.workdir import alone, claim, identity, refuse_other, tell_start


class Stopped(Exception):
    """SIGTERM: the state is saved, and the same command goes on."""


def train(config: Config, workdir: str | Path, *, progress: bool = True) -> Path:
    """Trains `config.method` to `config.steps` steps in `workdir`, resuming what is there.

    Returns:
        The work folder, whose `product.json` is written last.

    Raises:
        UserError: the folder holds another run, or one at work; the data is missing or of another kind;
            the loss is not finite; a checkpoint cannot be written or read.
        Stopped: SIGTERM came, and the state was saved.
    """
    workdir = Path(workdir)
    for name, value in (
        ("log_every", config.log_every),
        ("checkpoint.every", config.checkpoint.every),
    ):
        if value < 1:
            raise UserError(f"config.{name} = {value}", "Expected 1 or more steps")
    method = load_method(config)
    source = pipeline.open_source(config.data.path, method.batch_spec)
    path = workdir / "config.json"
    before = read_json(path)["identity"] if path.exists() else None
    what = identity(config, source, initial.hashes(config, before))
    if before is not None:
        refuse_other(workdir, before, what)
    if (workdir / "product.json").exists():
        return workdir
    with alone(workdir):
        return _train(config, workdir, method, source, what, progress)


def _train(
    config: Config, workdir: Path, method: Method, source: Any, what: dict[str, Any], progress: bool
) -> Path:
    spec, lead = method.batch_spec, jax.process_index() == 0
    progress = progress and lead

    # Everything that can be wrong with a config shows here, before the folder is claimed.
    mesh = make_mesh(config.get("mesh"))
    plan = make_plan(method, config, pipeline.shapes(source, spec), mesh)
    compiled = plan.step.lower(plan.state, plan.batch).compile()
    if lead:
        claim(workdir, config, what)

    # The state is made, or restored, straight into its shards.
    saver = checkpoints.manager(workdir, config.checkpoint.keep)
    state = checkpoints.restore(saver, saved_part(plan.state))
    if state is None:
        into = (config.get("initial") or {}).get("into", "")
        state = initial.put(plan.init(), initial.weights(config), plan.follows, into)
    else:
        state = {**state, "frozen": _only_frozen(plan)}
    first = int(state["step"])
    flops = model_flops(plan, config)
    if lead:
        tell_start(workdir, config, plan, first)
    if progress:
        print(
            f"from step {first} of {config.steps}\n"
            + "\n".join(summary(plan, compiled, flops, config))
        )

    where = next(iter(plan.batch.values())).sharding
    batches = to_device(
        pipeline.batches(
            config.data.path,
            spec,
            seed=config.seed,
            first_batch=first,
            workers=config.data.workers,
            rows=rows_of(where, spec.samples),
        ),
        where,
        spec.samples,
    )
    if lead and first == 0:
        _save_pictures(workdir, method, config)
    log = watch.Log(workdir, first, jax.process_index())
    warm = config.get("loss", {}).get("temperature_warmup", 0)
    alarms = Alarms(max(config.optimiser.warmup, warm), _prototypes(config))
    speed = Speed(spec.samples, flops / mesh.size)
    every = (config.get("probe") or {}).get("every", 0)
    probe = Probing(config, method, plan, workdir, what, log) if every else None
    if probe is not None and first == 0:
        probe(state, 0)
    trace = Trace(config.get("profile"), workdir)
    bar = tqdm(total=config.steps, initial=first, disable=not progress, desc=workdir.name)
    ended = False
    try:
        with contextlib.closing(batches), _sigterm() as told_to_stop:
            before: dict[str, Any] | None = None
            speed.start()
            for step in range(first, config.steps):
                trace.before(step)
                batch, waited = next(batches)
                with jax.transfer_guard("disallow"):
                    state, metrics = compiled(state, batch)
                trace.after(step, metrics)
                # The device goes on while the step before is looked at: a NaN is seen one step late.
                if before is not None:
                    _must_be_finite(before, step - 1, workdir)
                before = {k: metrics[k] for k in ("loss", "grad_norm")}
                done = step + 1
                stop = _agreed(told_to_stop, done) and done < config.steps
                due = done % config.checkpoint.every == 0 or done == config.steps or stop
                probed = probe is not None and (done % every == 0 or done == config.steps)
                logged = step % config.log_every == 0 or done == config.steps
                if logged or due or probed:
                    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                    _must_be_finite(values, step, workdir)  # so nothing that is not finite is saved
                speed.stepped(waited)
                if logged:
                    rates = speed.read()
                    found = alarms(step, values, rates)
                    log.write(step, values, rates, found)
                    bar.set_postfix_str(line(values, rates), refresh=False)
                    for alarm in found if progress else ():
                        bar.write(f"step {step}: {alarm}")
                if probed and probe is not None:
                    probe(state, done)
                if due:
                    checkpoints.save(saver, done, saved_part(state))
                if probed or due:
                    speed.start()  # neither counts as training time
                bar.update()
                if stop:
                    checkpoints.finish(saver)
                    raise Stopped(f"stopped by SIGTERM after step {done}; saved in {workdir}")
            checkpoints.finish(saver)
        ended = True
    finally:
        bar.close()
        for part in (trace, log, saver):
            # An error on its way out must not hide behind one of closing, on a full disk say.
            with contextlib.nullcontext() if ended else contextlib.suppress(Exception):
                part.close()
    product = on_host(method.product(params_of(state)), mesh)
    if lead:
        checkpoints.write_product(workdir, workdir.name, product, step=config.steps, identity=what)
    _together("product")
    return workdir


def _only_frozen(plan: Plan) -> dict[str, Any]:
    """Frozen parameters come from their own source, not from checkpoints."""
    if not plan.state["frozen"]:
        return {}
    where = jax.tree.map(lambda x: x.sharding, plan.state["frozen"])
    return jax.jit(lambda: plan.init()["frozen"], out_shardings=where)()


def _save_pictures(workdir: Path, method: Method, config: Config) -> None:
    """The first few samples as the student sees them, where the method can show that."""
    pictures = getattr(method, "pictures", None)
    if pictures is None:
        return
    spec = method.batch_spec
    block = math.lcm(spec.windows_per_field, config.batch.get("block", 1))
    count = min(spec.samples, -(-6 // block) * block)
    stream = pipeline.batches(
        config.data.path, spec, seed=config.seed, rows=[(0, count)], threads=1
    )
    with contextlib.closing(stream):
        batch = next(stream)
    index = jax.numpy.arange(count, dtype=jax.numpy.uint32)
    views = jax.jit(method.views)(batch, sample_keys(config.seed, "views", index))
    save_views(workdir, {kind: np.asarray(x[:6]) for kind, x in pictures(views).items()})


@contextlib.contextmanager
def _sigterm() -> Iterator[list[bool]]:
    """A list that is not empty once SIGTERM came. In several processes JAX's own service listens."""
    told: list[bool] = []
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def _agreed(told: list[bool], done: int) -> bool:
    """Whether to stop after this step: every process says the same."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(done)
    return bool(told)


def _together(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _must_be_finite(values: Mapping[str, Any], step: int, workdir: Path) -> None:
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        fine = ", ".join(f"{k} {float(v):.4g}" for k, v in values.items() if k not in bad)
        raise UserError(
            f"step {step}: {', '.join(bad)} not finite; the rest: {fine or 'none'}",
            f"The last good checkpoint is kept in {workdir}/checkpoints. Lower config.optimiser.lr,"
            " lengthen its warm-up, or look for bad records",
        )


def _prototypes(config: Config) -> int | None:
    return (config.get("head") or {}).get("prototypes")
