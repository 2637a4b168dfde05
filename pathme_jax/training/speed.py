"""How fast a run goes, and a window of it under the profiler."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pathme_jax.training import watch
from pathme_jax.training.contract import Config


class Speed:
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


def line(values: Mapping[str, float], rates: Mapping[str, float]) -> str:
    mfu = f", MFU {rates['mfu']:.0%}" if "mfu" in rates else ""
    return (
        f"loss {values['loss']:.3f}, {rates['samples_per_second']:.3g} img/s,"
        f" {rates['tflops_per_device']:.3g} TFLOP/s a device{mfu}, data {rates['data_wait']:.0%}"
    )


class Trace:
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
