"""The jitted step: who moves, who does not, and that the number of devices does not matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from pathme_jax.errors import UserError
from pathme_jax.training.contract import FROZEN, TRAINED, BatchSpec, EmaOf
from pathme_jax.training.sharding import make_mesh
from pathme_jax.training.step import build, saved_part


class Line:
    """y = w x, with an EMA teacher and a frozen offset; small enough to follow by hand."""

    def __init__(self, config: ConfigDict):
        self.momentum = float(config.momentum)
        self.batch_spec = BatchSpec(record="fields", samples=8)

    def init(self, key: jax.Array, shapes: Any):
        w = jax.random.normal(key, (3,))
        return {"student": {"w": w}, "teacher": {"w": w + 5}, "fixed": {"b": jnp.ones(())}}, {
            "seen": jnp.zeros(())
        }

    @property
    def roles(self):
        return [
            ("student/.*", TRAINED),
            ("teacher/(.*)", EmaOf(r"student/\1", lambda step: jnp.float32(self.momentum))),
            ("fixed/.*", FROZEN),
        ]

    def views(self, batch, keys):
        return {"x": batch["x"], "noise": jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys)}

    def loss(self, params, aux, views, keys, step):
        # The teacher is used without stop_gradient: the trainer must keep gradients from it anyway.
        out = (views["x"] + 0.1 * views["noise"]) @ params["student"]["w"] + params["fixed"]["b"]
        goal = views["x"] @ params["teacher"]["w"]
        return ((out - goal) ** 2).mean(), ({}, {"seen": aux["seen"] + len(out)})

    def product(self, params):
        return params["teacher"]


def line_config(momentum: float = 0.9, **changes) -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "steps": 10,
            "momentum": momentum,
            "optimiser": {
                "lr": 1e-2,
                "end_lr": 1e-2,
                "warmup": 0,
                "weight_decay": 0.0,
                "end_weight_decay": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "clip": 1.0,
                "lr_multipliers": ((".*", 1.0),),
                "decay_multipliers": ((".*", 1.0),),
            },
            **changes,
        }
    )


def run(momentum: float, steps: int = 1, **changes):
    config = line_config(momentum, **changes)
    batch = {"x": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)}
    state, step = build(Line(config), config, batch, make_mesh())
    history = [jax.tree.map(np.asarray, state)]
    for _ in range(steps):
        state, _ = step(state, batch)
        history.append(jax.tree.map(np.asarray, state))
    return history


def test_a_teacher_starts_as_its_student():
    state = run(0.9, 0)[0]
    np.testing.assert_array_equal(state["ema"]["teacher/w"], state["trained"]["student/w"])


def test_momentum_one_freezes_the_teacher_and_zero_copies_the_student():
    before, after = run(1.0)
    np.testing.assert_array_equal(after["ema"]["teacher/w"], before["ema"]["teacher/w"])
    assert (after["trained"]["student/w"] != before["trained"]["student/w"]).all()
    _, after = run(0.0)
    np.testing.assert_array_equal(after["ema"]["teacher/w"], after["trained"]["student/w"])


def test_the_teacher_is_the_closed_form_of_its_students():
    """After n steps: m^n w_0 + (1 - m) sum m^(n - i) w_i; all-ones would stay ones."""
    history, m = run(0.9, 6), 0.9
    expected = history[0]["trained"]["student/w"].astype(np.float64)
    for state in history[1:]:
        expected = m * expected + (1 - m) * state["trained"]["student/w"]
    np.testing.assert_allclose(history[-1]["ema"]["teacher/w"], expected, rtol=1e-5)


def test_frozen_parameters_do_not_move_and_are_not_saved():
    before, after = run(0.9)
    assert after["frozen"]["fixed/b"] == before["frozen"]["fixed/b"] == 1
    assert "frozen" not in saved_part(after) and after["aux"]["seen"] == 8


def test_an_ema_of_something_untrained_is_refused():
    class Wrong(Line):
        @property
        def roles(self):
            return [
                ("student/.*", FROZEN),
                ("teacher/(.*)", EmaOf(r"student/\1", lambda s: s)),
                (".*", FROZEN),
            ]

    with pytest.raises(UserError, match="not trained"):
        build(Wrong(line_config()), line_config(), {"x": np.zeros((8, 3), np.float32)}, make_mesh())


_ONE_STEP = """
import json, numpy as np, jax
from configs.dinov2_tiny import get_config
from pathme_jax.training.contract import load_method
from pathme_jax.training.sharding import make_mesh
from pathme_jax.training.step import build
config = get_config("test")
config.sharding = ((".*", "fsdp"),)
config.optimiser.warmup = 0
batch = {"window": np.random.default_rng(0).integers(0, 255, (16, 256, 256, 3)).astype(np.uint8),
         "mpp": np.ones(16, np.float32)}
state, step = build(load_method(config), config, batch, make_mesh())
before = jax.tree.map(np.asarray, state["trained"])
state, metrics = step(state, batch)
centre = np.asarray(state["aux"]["dino"])
moments = {k: np.asarray(v) for k, v in state["opt"].mu.items()}  # 0.1 x the clipped gradient
print(json.dumps({"devices": jax.device_count(), "metrics": {k: float(v) for k, v in metrics.items()},
                  "centre": centre.tolist(), "grads": {k: v.ravel().tolist() for k, v in moments.items()}}))
"""


def one_step(devices: int) -> dict[str, Any]:
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [sys.executable, "-c", _ONE_STEP], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_one_device_equals_eight():
    """Loss, centre and gradients of one DINOv2 step, everything sharded, to 1e-5 of the tree's norm."""
    one, eight = one_step(1), one_step(8)
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert one["metrics"]["loss"] == pytest.approx(eight["metrics"]["loss"], rel=1e-5)
    np.testing.assert_allclose(one["centre"], eight["centre"], atol=1e-5)
    a = np.concatenate([np.array(one["grads"][k]) for k in sorted(one["grads"])])
    b = np.concatenate([np.array(eight["grads"][k]) for k in sorted(eight["grads"])])
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)
