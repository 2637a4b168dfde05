"""The training loop: data, step, log, probe, checkpoint. The order of the phases matters to exact resume.

A run of several processes runs this same code in each; process 0 alone writes what is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from pathme_jax.data import pipeline
from pathme_jax.data.device import rows_of, to_device
from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, provenance, read_json, write_json
from pathme_jax.models.placement import by_sample
from pathme_jax.training import checkpoints, cost, initial, watch
from pathme_jax.training.alarms import Alarms
from pathme_jax.training.contract import Config, Method, flat, load_method
from pathme_jax.training.describe import model_flops, summary
from pathme_jax.training.keys import sample_keys
from pathme_jax.training.pictures import save_views
from pathme_jax.training.probe import Probe
from pathme_jax.training.sharding import make_mesh
from pathme_jax.training.step import Plan, make_plan, on_host, params_of, saved_part

# Keys of a config that say how a run is carried out, not what it computes.
OPERATIONAL = ("log_every", "checkpoint", "data", "mesh", "sharding", "probe", "profile", "initial")
OPERATIONAL_OF_MODEL = ("remat", "unroll", "attention")


class Stopped(Exception):
    """SIGTERM: the state is saved, and the same command goes on."""


def identity(config: Config, source: Any, starts_from: Mapping[str, str]) -> dict[str, Any]:
    """What decides the result: the config without its operational keys, the data, the first weights.

    Data and weights are named by the hash of their content, not by where they lie.
    """
    what = {k: v for k, v in json.loads(config.to_json()).items() if k not in OPERATIONAL}
    for key in OPERATIONAL_OF_MODEL:
        what.get("model", {}).pop(key, None)
    more = {"initial": dict(starts_from)} if starts_from else {}
    return {"config": what, "data": repr(source), **more}


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
        _same_recipe(workdir, before, what)
    if (workdir / "product.json").exists():
        return workdir
    with _alone(workdir):
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
    if lead and not (workdir / "config.json").exists():
        about = {"config": json.loads(config.to_json()), "identity": what}
        write_json(workdir / "config.json", {**about, "provenance": provenance()})

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
        _tell_start(workdir, config, plan, first)
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
    speed = _Speed(spec.samples, flops / mesh.size)
    probe = _Probing(config, method, plan, workdir, what, log) if _every(config) else None
    if probe is not None and first == 0:
        probe(state, 0)
    trace = _Trace(config.get("profile"), workdir)
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
                probed = probe is not None and (
                    done % config.probe.every == 0 or done == config.steps
                )
                logged = step % config.log_every == 0 or done == config.steps
                if logged or due or probed:
                    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                    _must_be_finite(values, step, workdir)  # so nothing that is not finite is saved
                speed.stepped(waited)
                if logged:
                    rates = speed.read()
                    found = alarms(step, values, rates)
                    log.write(step, values, rates, found)
                    bar.set_postfix_str(_line(values, rates), refresh=False)
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


class _Speed:
    """Samples a second and the share of time spent waiting for data, since it was last read."""

    def __init__(self, samples: int, flops: float):
        """samples: a step, over all devices. flops: a step, of one device."""
        self.samples, self.flops = samples, flops
        self.peak = watch.peak_flops(jax.devices()[0])
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0

    def start(self) -> None:
        self.now = time.perf_counter()

    def stepped(self, waited: float) -> None:
        before, self.now = self.now, time.perf_counter()
        self.steps, self.seconds = self.steps + 1, self.seconds + self.now - before
        self.waited += waited

    def read(self) -> dict[str, float]:
        a_second = self.steps / self.seconds
        flops = self.flops * a_second
        rates = {
            "samples_per_second": self.samples * a_second,
            "samples_per_second_per_device": self.samples * a_second / jax.device_count(),
            "data_wait": self.waited / self.seconds,
            "tflops_per_device": flops / 1e12,
            **({"mfu": flops / self.peak} if self.peak else {}),
        }
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        return rates


def _line(values: Mapping[str, float], rates: Mapping[str, float]) -> str:
    mfu = f", MFU {rates['mfu']:.0%}" if "mfu" in rates else ""
    return (
        f"loss {values['loss']:.3f}, {rates['samples_per_second']:.3g} img/s,"
        f" {rates['tflops_per_device']:.3g} TFLOP/s a device{mfu}, data {rates['data_wait']:.0%}"
    )


def _every(config: Config) -> int:
    return (config.get("probe") or {}).get("every", 0)


def _prototypes(config: Config) -> int | None:
    return (config.get("head") or {}).get("prototypes")


class _Probing:
    """kNN and linear probes of the product, logged, and the best step's product kept in <workdir>/best.

    A line of step n tells of the state after that step's update; the one of step -1 of random weights,
    with mean colour beside it. Every process computes features; process 0 judges and decides.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        plan: Plan,
        workdir: Path,
        what: dict[str, Any],
        log: watch.Log,
    ):
        self.probe, self.method, self.mesh = Probe(config.probe), method, plan.mesh
        self.workdir, self.what, self.log = workdir / "best", what, log

        def encode(product: Any, batch: Any) -> Any:
            with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):
                return method.encode(product, {k: by_sample(x) for k, x in batch.items()})

        self.encode = jax.jit(encode, out_shardings=NamedSharding(plan.mesh, PartitionSpec()))

    def __call__(self, state: Any, done: int) -> None:
        product = self.method.product(params_of(state))
        features = self.probe.features(self.encode, product)
        values, better = {}, False
        if jax.process_index() == 0:
            values = self.probe.scores(features)
            more = self.probe.baselines() if done == 0 else {}
            self.log.write(done - 1, {**values, **more}, {})
            better = done > 0 and values[f"{self.probe.name}/linear_auroc"] > self._best()
        if jax.process_count() > 1:
            better = bool(multihost_utils.broadcast_one_to_all(np.array(better)))
        if better:
            product = on_host(product, self.mesh)
            if jax.process_index() == 0:
                checkpoints.write_product(
                    self.workdir,
                    f"{self.workdir.parent.name}-best",
                    product,
                    step=done,
                    identity=self.what,
                    score=values[f"{self.probe.name}/linear_auroc"],
                )

    def _best(self) -> float:
        path = self.workdir / "product.json"
        return read_json(path)["score"] if path.exists() else -1.0


class _Trace:
    """Traces steps [first, first + steps) for xprof or Perfetto, or what is left of them after a resume."""

    def __init__(self, window: Config | None, workdir: Path):
        self.window, self.folder, self.on = (
            window or {"first": 0, "steps": 0},
            workdir / "profile",
            False,
        )

    def before(self, step: int) -> None:
        if not self.on and 0 <= step - self.window["first"] < self.window["steps"]:
            jax.profiler.start_trace(str(self.folder))
            self.on = True

    def after(self, step: int, metrics: Any) -> None:
        if self.on and step + 1 == self.window["first"] + self.window["steps"]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self.on:
            self.on = False
            jax.profiler.stop_trace()


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


def _tell_start(workdir: Path, config: Config, plan: Plan, first: int) -> None:
    """What this process runs with: it may be other code, or another mesh, than before."""
    settings = {k: v for k, v in json.loads(config.to_json()).items() if k in OPERATIONAL}
    mesh = {name: int(size) for name, size in plan.mesh.shape.items()}
    row = {"step": first, "mesh": mesh, "settings": settings, **provenance()}
    with open(workdir / "starts.jsonl", "a") as file:
        file.write(json.dumps(row, default=str) + "\n")
    with atomic(workdir / "parameters.txt") as temporary:
        temporary.write_text(cost.table(plan.table) + "\n")


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


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
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


def _same_recipe(workdir: Path, before: Mapping[str, Any], what: Mapping[str, Any]) -> None:
    """Refuses a folder that another run already uses."""
    if digest(before) != digest(what):
        old, new = flat(_plain(before)), flat(_plain(what))
        differ = sorted(k for k in old | new if old.get(k) != new.get(k))
        shown = ", ".join(f"{k}: {old.get(k)} then, {new.get(k)} now" for k in differ[:3])
        raise UserError(
            f"{workdir} holds a run of another recipe ({shown}{' …' if differ[3:] else ''})",
            "Use another --workdir, or the old settings to go on with that run",
        )


def _plain(tree: Any) -> dict[str, Any]:
    """As it comes back from a file; empty branches become None, which `flat` keeps."""
    return json.loads(json.dumps(tree), object_hook=lambda d: d or None)


def _must_be_finite(values: Mapping[str, Any], step: int, workdir: Path) -> None:
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        fine = ", ".join(f"{k} {float(v):.4g}" for k, v in values.items() if k not in bad)
        raise UserError(
            f"step {step}: {', '.join(bad)} not finite; the rest: {fine or 'none'}",
            f"The last good checkpoint is kept in {workdir}/checkpoints. Lower config.optimiser.lr,"
            " lengthen its warm-up, or look for bad records",
        )
