"""The training loop: data, step, log, probe, checkpoint. The order of the phases matters to exact resume.

A run of several processes runs this same code in each; process 0 alone writes what is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
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
from pathme_jax.files import digest, provenance, read_json, write_json
from pathme_jax.training import checkpoints, cost, initial, watch
from pathme_jax.training.alarms import Alarms
from pathme_jax.training.contract import Config, Method, flat, load_method
from pathme_jax.training.keys import sample_keys
from pathme_jax.training.pictures import save_views
from pathme_jax.training.probe import Probe
from pathme_jax.training.sharding import make_mesh
from pathme_jax.training.step import Plan, make_plan, on_host, params_of, saved_part

# Keys of a config that say how a run is carried out, not what it computes.
OPERATIONAL = ("log_every", "checkpoint", "data", "mesh", "sharding", "probe", "profile", "initial")


class Stopped(Exception):
    """SIGTERM: the state is saved, and the same command goes on."""


def identity(config: Config, source: Any, starts_from: Mapping[str, str]) -> dict[str, Any]:
    """What decides the result: the config without its operational keys, the data, the first weights.

    Data and weights are named by the hash of their content, not by where they lie.
    """
    what = {k: v for k, v in json.loads(config.to_json()).items() if k not in OPERATIONAL}
    more = {"initial": dict(starts_from)} if starts_from else {}
    return {"config": what, "data": repr(source), **more}


def train(config: Config, workdir: str | Path, *, progress: bool = True) -> Path:
    """Trains `config.method` to `config.steps` steps in `workdir`, resuming what is there.

    Returns:
        The work folder, whose `product.json` is written last.

    Raises:
        UserError: the folder holds another run; the data is missing or of another kind; the loss is
            not finite; a checkpoint cannot be written or read.
        Stopped: SIGTERM came, and the state was saved.
    """
    workdir = Path(workdir)
    method = load_method(config)
    spec = method.batch_spec
    source = pipeline.open_source(config.data.path, spec)
    weights, starts_from = initial.load(config)
    what = identity(config, source, starts_from)
    lead = jax.process_index() == 0
    if lead:
        _claim(workdir, config, what)
    _together("claimed")
    if (workdir / "product.json").exists():
        return workdir
    progress = progress and lead

    # The state is made, or restored, straight into its shards.
    mesh = make_mesh(config.get("mesh"))
    plan = make_plan(method, config, pipeline.shapes(source, spec), mesh)
    saver = checkpoints.manager(workdir, config.checkpoint.keep)
    state = checkpoints.restore(saver, saved_part(plan.state))
    if state is None:
        state = plan.init()
        if weights:
            state = initial.put(state, weights, starts_from, plan.follows)
    else:
        state = {**state, "frozen": _only_frozen(plan)}
    first = int(state["step"])

    compiled = plan.step.lower(plan.state, plan.batch).compile()
    flops = cost.matmul_flops(plan.step, plan.state, plan.batch)
    if progress:
        print(f"from step {first} of {config.steps}\n{_summary(plan, compiled, flops)}")

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
    alarms = Alarms(config.optimiser.warmup, _prototypes(config))
    speed = _Speed(spec.samples, flops / mesh.size)
    probe = _Probing(config, method, plan, workdir, what, log) if _every(config) else None
    if probe is not None and first == 0:
        probe(state, 0)
    bar = tqdm(total=config.steps, initial=first, disable=not progress, desc=workdir.name)
    ended = False
    try:
        with contextlib.closing(batches), _sigterm() as told_to_stop:
            before: dict[str, Any] | None = None
            speed.start()
            for step in range(first, config.steps):
                with _profile(config, workdir, step):
                    batch, waited = next(batches)
                    state, metrics = compiled(state, batch)
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
        for part in (log, saver):
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
    with mean colour beside it.
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
        # Every process computes all features, and gets them whole.
        self.encode = jax.jit(
            method.encode, out_shardings=NamedSharding(plan.mesh, PartitionSpec())
        )

    def __call__(self, state: Any, done: int) -> None:
        product = self.method.product(params_of(state))
        values = self.probe(self.encode, product)
        more = self.probe.baselines() if done == 0 else {}
        self.log.write(done - 1, {**values, **more}, {})
        score = values[f"{self.probe.name}/linear_auroc"]
        if done and score > self._best():
            product = on_host(product, self.mesh)
            if jax.process_index() == 0:
                checkpoints.write_product(
                    self.workdir,
                    f"{self.workdir.parent.name}-best",
                    product,
                    step=done,
                    identity=self.what,
                    score=score,
                )
            _together("best")

    def _best(self) -> float:
        path = self.workdir / "product.json"
        return read_json(path)["score"] if path.exists() else -1.0


def _summary(plan: Plan, compiled: Any, flops: int) -> str:
    trained = sum(int(np.prod(x.shape)) for x in plan.state["trained"].values())
    used = cost.memory(compiled)
    total = used["argument"] + used["output"] - used["alias"] + used["temp"]
    samples = next(iter(plan.batch.values())).shape[0]
    return (
        f"{trained:,} trained parameters on {plan.mesh.size} device(s)"
        f" of mesh {dict(plan.mesh.shape)}; {total / 2**20:,.0f} MiB a device;"
        f" {flops / samples / 1e9:.4g} GFLOP a sample"
    )


def _only_frozen(plan: Plan) -> dict[str, Any]:
    """Frozen parameters come from their own source, not from checkpoints."""
    if not plan.state["frozen"]:
        return {}
    where = jax.tree.map(lambda x: x.sharding, plan.state["frozen"])
    return jax.jit(lambda: plan.init()["frozen"], out_shardings=where)()


def _save_pictures(workdir: Path, method: Method, config: Config) -> None:
    """Six samples of the first batch as the student sees them, where the method can show that."""
    pictures = getattr(method, "pictures", None)
    if pictures is None:
        return
    stream = pipeline.batches(config.data.path, method.batch_spec, seed=config.seed)
    with contextlib.closing(stream):
        batch = next(stream)
    index = jax.numpy.arange(method.batch_spec.samples, dtype=jax.numpy.uint32)
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


@contextlib.contextmanager
def _profile(config: Config, workdir: Path, step: int) -> Iterator[None]:
    """Traces steps [first, first + steps) of config.profile for xprof or Perfetto."""
    window = config.get("profile") or {"first": 0, "steps": 0}
    end = window["first"] + window["steps"]
    if window["steps"] and step == window["first"]:
        jax.profiler.start_trace(str(workdir / "profile"))
    yield
    if window["steps"] and step + 1 == end:
        jax.effects_barrier()
        jax.profiler.stop_trace()


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


def _must_be_finite(values: Mapping[str, Any], step: int, workdir: Path) -> None:
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        fine = ", ".join(f"{k} {float(v):.4g}" for k, v in values.items() if k not in bad)
        raise UserError(
            f"step {step}: {', '.join(bad)} not finite; the rest: {fine or 'none'}",
            f"The last good checkpoint is kept in {workdir}/checkpoints. Lower config.optimiser.lr,"
            " lengthen its warm-up, or look for bad records",
        )
