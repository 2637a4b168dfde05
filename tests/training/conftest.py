"""A tiny DINOv2, and a third method that lives outside the package."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs.dinov2_tiny import get_config


@pytest.fixture
def config(grid_dir: Path) -> ConfigDict:
    """Two hundred thousand parameters, four steps."""
    config = get_config("test")
    config.data.path = str(grid_dir)
    return config


# A third method, in a file of its own outside the package: a student follows the mean colour of windows.
METHOD = """
import flax.linen as nn, jax, jax.numpy as jnp
from pathme_jax.training.contract import TRAINED, BatchSpec, EmaOf

class Colour:
    def __init__(self, config):
        self.batch_spec = BatchSpec("fields", config.batch.samples, window_px=32, windows_per_field=2)
        self.dense = nn.Dense(4)
        self.nan_at = config.nan_at

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
        loss = ((out - views.sum(-1, keepdims=True)) ** 2).mean()
        return jnp.where(step == self.nan_at, jnp.nan, loss), ({}, aux)

    def product(self, params):
        return params["teacher"]

    def encode(self, product, batch):
        return self.dense.apply({"params": product}, self.colour(batch["image"]))

    def colour(self, images):
        return images.astype(jnp.float32).mean((1, 2)) / 255
"""

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({config})
"""


@dataclasses.dataclass
class Outside:
    """Config and folder of that method, and how to run it as a user would."""

    config: Any
    folder: Path

    def start(self, name: str, *flags: str, devices: int = 1) -> subprocess.Popen[bytes]:
        """`python -m pathme_jax.train` into <folder>/<name>, on so many fake devices."""
        command, env = self._command(name, flags, "")
        env |= {"JAX_NUM_CPU_DEVICES": str(devices)}
        with open(self.folder / f"{name}.log", "a") as log:
            return subprocess.Popen(command, env=env, stderr=log)

    def refused(self, name: str, *flags: str, launcher: str = "") -> str:
        """The one line that says why, of a run that must end with 2. (Orbax logs a failed write beside it.)

        launcher: code that ends by running what `python -m` would.
        """
        command, env = self._command(name, flags, launcher)
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=120)
        assert done.returncode == 2, done.stderr[-2000:]
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return line

    def _command(
        self, name: str, flags: tuple[str, ...], launcher: str
    ) -> tuple[list[str], dict[str, str]]:
        path = self.folder / f"{name}.py"
        path.write_text(CONFIG.format(config=self.config.to_dict()))
        command = [sys.executable, *(["-c", launcher] if launcher else ["-m"]), "pathme_jax.train"]
        command += ["--config", str(path), "--workdir", str(self.folder / name), *flags]
        roots = [self.folder / "elsewhere", Path(__file__).parents[2]]
        return command, {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))}

    def here(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """The config, to run in this process."""
        monkeypatch.syspath_prepend(str(self.folder / "elsewhere"))
        return self.config


@pytest.fixture
def outside(tmp_path: Path, grid_dir: Path) -> Outside:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "third_method.py").write_text(METHOD)
    everywhere = ((".*", 1.0),)
    optimiser = {
        "lr": 1e-2, "end_lr": 1e-3, "warmup": 2, "weight_decay": 0.0, "end_weight_decay": 0.0,
        "b1": 0.9, "b2": 0.999, "clip": 1.0, "lr_multipliers": everywhere,
        "decay_multipliers": everywhere,
    }  # fmt: skip
    config = ConfigDict(
        {
            "method": "third_method:Colour", "seed": 1, "steps": 20, "batch": {"samples": 8},
            "optimiser": optimiser, "data": {"path": str(grid_dir), "workers": 0}, "nan_at": -1,
            "checkpoint": {"every": 5, "keep": 2}, "log_every": 5,
        }
    )  # fmt: skip
    return Outside(config, tmp_path)
