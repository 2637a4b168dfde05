"""A whole run: resumed equals uninterrupted, and what a folder or a value is refused for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from pathme_jax.errors import UserError
from pathme_jax.files import read_json
from pathme_jax.training import loop
from pathme_jax.training.checkpoints import fingerprint, load_product
from pathme_jax.training.loop import train

# A third method, in a file of its own outside the package: a student follows the mean colour of windows.
METHOD = """
import flax.linen as nn, jax, jax.numpy as jnp
from pathme_jax.training.contract import TRAINED, BatchSpec, EmaOf

class Colour:
    def __init__(self, config):
        self.batch_spec = BatchSpec("fields", config.batch.samples, window_px=32, windows_per_field=2)
        self.dense = nn.Dense(4)

    def init(self, key, shapes):
        weights = self.dense.init(key, jnp.zeros((1, 3)))["params"]
        return {"student": weights, "teacher": weights}, {}

    @property
    def roles(self):
        return [("student/.*", TRAINED), ("teacher/(.*)", EmaOf(r"student/\\1", lambda step: 0.9))]

    def views(self, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        return self.colour(batch["window"]) + 0.1 * noise

    def loss(self, params, aux, views, keys, step):
        out = self.dense.apply({"params": params["student"]}, views)
        return ((out - views.sum(-1, keepdims=True)) ** 2).mean(), ({}, aux)

    def product(self, params):
        return params["teacher"]

    def encode(self, product, batch):
        return self.dense.apply({"params": product}, self.colour(batch["image"]))

    def colour(self, images):
        return images.astype(jnp.float32).mean((1, 2)) / 255
"""

RUN = """
import sys
from ml_collections import ConfigDict
from pathme_jax.files import read_json
from pathme_jax.training.loop import train
if __name__ == "__main__":
    train(ConfigDict(read_json(sys.argv[1])), sys.argv[2], progress=False)
"""


@pytest.fixture
def outside(tmp_path: Path, grid_dir: Path) -> tuple[ConfigDict, dict[str, str]]:
    """Config and environment of a method that lives outside the package."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "third_method.py").write_text(METHOD)
    flat = (((".*", 1.0),),) * 2
    optimiser = {
        "lr": 1e-2, "end_lr": 1e-3, "warmup": 2, "weight_decay": 0.0, "end_weight_decay": 0.0,
        "b1": 0.9, "b2": 0.999, "clip": 1.0, "lr_multipliers": flat[0], "decay_multipliers": flat[1],
    }  # fmt: skip
    config = ConfigDict(
        {
            "method": "third_method:Colour", "seed": 1, "steps": 200, "batch": {"samples": 8},
            "optimiser": optimiser, "data": {"path": str(grid_dir), "workers": 0},
            "checkpoint": {"every": 5, "keep": 2}, "log_every": 5,
        }
    )  # fmt: skip
    path = os.pathsep.join([str(tmp_path / "elsewhere"), os.environ.get("PYTHONPATH", "")])
    return config, {**os.environ, "PYTHONPATH": path}


def start(config: ConfigDict, env: dict[str, str], tmp_path: Path, name: str) -> subprocess.Popen:
    (tmp_path / "config.json").write_text(config.to_json())
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path / "config.json"), str(tmp_path / name)], env=env
    )


def test_a_method_outside_the_package_trains_is_killed_resumes_and_extracts(
    outside, tmp_path: Path, grid_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed twice with SIGKILL, the run ends with the parameters and metrics of one left alone."""
    config, env = outside
    assert start(config, env, tmp_path, "whole").wait(120) == 0
    for least in (5, 60):
        process = start(config, env, tmp_path, "killed")
        saved = tmp_path / "killed" / "checkpoints"
        deadline = time.monotonic() + 120
        while not any(int(p.name) >= least for p in saved.glob("[0-9]*") if p.name.isdigit()):
            assert time.monotonic() < deadline and process.poll() is None, "ended before the kill"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(config, env, tmp_path, "killed").wait(120) == 0
    whole, killed = (read_json(tmp_path / name / "product.json") for name in ("whole", "killed"))
    assert whole["sha256"] == killed["sha256"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 41

    from pathme_jax.encoders.extraction import extract_fields

    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    done = extract_fields(grid_dir, [tmp_path / "killed"], multiples=[4], progress=False)
    assert done.done == 4 and not done.errors


def test_dinov2_resumed_equals_uninterrupted_bit_for_bit(config: ConfigDict, tmp_path: Path):
    """Two steps, a checkpoint, two more in a new process state: the same as four in one go."""
    whole = train(config, tmp_path / "whole", progress=False)
    real = loop.checkpoints.ocp.CheckpointManager.save

    class Stop(Exception):
        pass

    def save_then_die(self, step, *args, **kwargs):
        real(self, step, *args, **kwargs)
        if step == 3:
            self.wait_until_finished()
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ocp.CheckpointManager, "save", save_then_die)
        train(config, tmp_path / "halves", progress=False)
    halves = train(config, tmp_path / "halves", progress=False)
    assert (
        read_json(whole / "product.json")["sha256"] == read_json(halves / "product.json")["sha256"]
    )
    assert (whole / "metrics.jsonl").read_text() == (halves / "metrics.jsonl").read_text()
    # and the product is the EMA teacher of the last checkpoint, not the random start
    _, _, product = load_product(whole)
    saver = ocp.CheckpointManager((whole / "checkpoints").absolute())
    saved = saver.restore(saver.latest_step(), args=ocp.args.StandardRestore())
    saver.close()
    teacher = {
        k.removeprefix("teacher/backbone/"): v for k, v in saved["ema"].items() if "backbone" in k
    }
    assert fingerprint(product) == fingerprint(loop.checkpoints.nested(teacher))
    config.steps = 0
    untrained = train(config, tmp_path / "untrained", progress=False)
    assert (
        read_json(untrained / "product.json")["sha256"]
        != read_json(whole / "product.json")["sha256"]
    )
    # a finished run is left alone, and its folder refuses another recipe
    config.steps = 4
    before = (whole / "product.json").stat().st_mtime_ns
    train(config, whole, progress=False)
    assert (whole / "product.json").stat().st_mtime_ns == before
    config.optimiser.lr = 0.5
    with pytest.raises(UserError, match=r"config/optimiser/lr: 0.002 then, 0.5 now"):
        train(config, whole, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_so(outside, tmp_path, monkeypatch):
    config, _ = outside
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    config.optimiser.lr = float("nan")
    with pytest.raises(UserError, match="not finite"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "product.json").exists()


def test_a_checkpoint_of_another_architecture_is_refused(outside, tmp_path, monkeypatch):
    config, _ = outside
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    config.steps = 5
    run = train(config, tmp_path / "run", progress=False)
    (run / "product.json").unlink()
    source = (tmp_path / "elsewhere" / "third_method.py").read_text()
    (tmp_path / "elsewhere" / "fourth_method.py").write_text(source.replace("Dense(4)", "Dense(6)"))
    config.method = "fourth_method:Colour"
    about = read_json(run / "config.json")
    about["identity"]["config"]["method"] = config.method
    (run / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="cannot be restored"):
        train(config, run, progress=False)


def test_a_product_that_was_changed_is_refused(outside, tmp_path, monkeypatch):
    config, _ = outside
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    config.steps = 5
    run = train(config, tmp_path / "run", progress=False)
    about = read_json(run / "product.json")
    (run / "product.json").write_text(json.dumps({**about, "sha256": "0" * 64}))
    with pytest.raises(UserError, match="differ from those"):
        load_product(run)
    with pytest.raises(UserError, match="no finished training run"):
        load_product(tmp_path)


def test_a_log_line_cut_short_by_a_kill_is_dropped(tmp_path: Path):
    for name in ("metrics.jsonl", "timing.jsonl"):
        (tmp_path / name).write_text('{"step": 0, "loss": 1}\n{"step": 5, "loss": 2}\n{"step": 1')
    loop._Log(tmp_path, first=5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 1}\n'


def test_a_batch_that_does_not_divide_is_refused(config: ConfigDict, tmp_path: Path):
    config.batch.samples = 15
    with pytest.raises(UserError, match="no multiple"):
        train(config, tmp_path, progress=False)


def test_data_of_another_kind_is_refused(config: ConfigDict, tmp_path: Path):
    config.data.path = str(tmp_path)
    with pytest.raises(UserError, match=r"slides.csv"):
        train(config, tmp_path / "run", progress=False)


def test_fingerprints_tell_values_names_and_types_apart():
    one = {"a": np.ones(2, np.float32)}
    others = [{"b": one["a"]}, {"a": one["a"] * 2}, {"a": one["a"].astype(np.float64)}]
    assert len({fingerprint(p) for p in [one, *others]}) == 4
