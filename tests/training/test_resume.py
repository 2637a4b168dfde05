"""A run that goes on elsewhere: other devices, other workers, and after a signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from pathme_jax.files import read_json


def run_part(config: Path, workdir: Path, devices: int, workers: int, stop_after: int) -> int:
    command = [sys.executable, str(Path(__file__).with_name("run_part.py")), str(config)]
    command += [str(workdir), str(devices), str(workers), str(stop_after)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode


def losses(workdir: Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_a_run_goes_on_after_a_kill_and_with_other_devices_and_workers(
    config: ConfigDict, cohort: Path, tmp_path: Path
):
    """DINOv2 with probes. On one device, killed with SIGKILL at step 4: the same product, metrics, probes
    and best, bit for bit. Killed on 8 devices and gone on with on 4 with two workers: the same examples, or the
    losses could not agree, and every loss to 1e-3."""
    config.steps = 8
    config.sharding = ((".*/prototypes", "prototypes"), (".*", "fsdp"))
    config.mesh = dict(data=1, fsdp=-1)
    config.loss.drop_path = 0.25
    config.batch.block = 2
    # As in one_step.py: no decision on the last bit, and small steps, since Adam makes whole ones of noise.
    config.loss.koleo = 0.0
    config.optimiser.lr = 1e-4
    config.checkpoint = dict(every=2, keep=2)
    labels = str(cohort / "labels.csv")
    config.probe.update(every=4, path=config.data.path, labels=labels, column="detail")
    config.probe.update(tiles=4, folds=2)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert run_part(path, tmp_path / "whole", 1, 0, -1) == 0
    assert run_part(path, tmp_path / "killed", 1, 0, 4) == -signal.SIGKILL
    assert run_part(path, tmp_path / "killed", 1, 0, -1) == 0
    for name in ("metrics.jsonl", "alarms.jsonl"):
        texts = [(tmp_path / run / name).read_text() for run in ("whole", "killed")]
        assert texts[0] == texts[1]
    for name in ("product.json", "best/product.json"):
        whole, killed = (read_json(tmp_path / run / name) for run in ("whole", "killed"))
        assert (whole["sha256"], whole["step"]) == (killed["sha256"], killed["step"])

    config.probe.every = 0
    path.write_text(config.to_json())
    assert run_part(path, tmp_path / "parts", 8, 0, 4) == -signal.SIGKILL
    assert run_part(path, tmp_path / "parts", 4, 2, -1) == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(whole) == len(parts) == 8
    assert parts == pytest.approx(whole, rel=1e-3)
    assert whole[0] != pytest.approx(whole[1], rel=1e-3)  # another batch would be seen
    starts = (tmp_path / "parts" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["mesh"]["fsdp"] for line in starts] == [8, 4]


def test_sigterm_saves_and_the_same_command_goes_on(outside, tmp_path: Path):
    outside.config.checkpoint.every = 1000
    outside.config.steps = 150
    assert outside.start("whole").wait(120) == 0
    process = outside.start("told")
    log = tmp_path / "told" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143  # what a scheduler takes for "ended by SIGTERM", not for done
    saved = [int(p.name) for p in (tmp_path / "told" / "checkpoints").iterdir()]
    assert len(saved) == 1 and 20 < saved[0] < 150
    assert outside.start("told").wait(120) == 0
    products = [read_json(tmp_path / name / "product.json") for name in ("whole", "told")]
    assert products[0]["sha256"] == products[1]["sha256"]
    texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "told")]
    assert texts[0] == texts[1]


def together(outside, name: str, kill_at: int = 0) -> list[int]:
    """Exit codes of two processes of two devices each; both told to stop once `kill_at` steps are logged."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        flags = ["--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", "2"]
    both = [outside.start(name, *flags, "--process", str(i), devices=2) for i in (0, 1)]
    log = outside.folder / name / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while kill_at and not (log.exists() and len(log.read_text().splitlines()) > kill_at):
        assert time.monotonic() < deadline and both[0].poll() is None
        time.sleep(0.01)
    if kill_at:
        both[1].send_signal(signal.SIGTERM)  # one is told, both must stop at the same step
    return [process.wait(200) for process in both]


def test_two_processes_train_stop_together_and_one_goes_on(outside, tmp_path: Path):
    """Checkpoints, logs and the product of two processes are those of one: the run is the same run."""
    outside.config.steps = 200
    outside.config.checkpoint.every = 1000
    outside.config.mesh = {"data": -1}
    assert outside.start("alone", devices=1).wait(200) == 0
    assert together(outside, "pair", kill_at=5) == [143, 143]
    (saved,) = (tmp_path / "pair" / "checkpoints").iterdir()
    assert 25 < int(saved.name) < 200
    assert outside.start("pair", devices=2).wait(200) == 0
    assert losses(tmp_path / "pair") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    outside.config.steps = 20
    assert together(outside, "short") == [0, 0]
    assert (tmp_path / "short" / "product.json").exists()
