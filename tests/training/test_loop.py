"""A whole run: resumed equals uninterrupted, and what a folder or a value is refused for."""

from __future__ import annotations

import json
import signal
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


def test_a_method_outside_the_package_trains_is_killed_resumes_and_extracts(
    outside, tmp_path: Path, grid_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed twice with SIGKILL, the run ends with the parameters and metrics of one left alone."""
    outside.config.steps = 80
    assert outside.start("whole").wait(120) == 0
    for least in (5, 40):
        process = outside.start("killed")
        saved = tmp_path / "killed" / "checkpoints"
        deadline = time.monotonic() + 120
        while not any(int(p.name) >= least for p in saved.glob("[0-9]*") if p.name.isdigit()):
            assert time.monotonic() < deadline and process.poll() is None, "ended before the kill"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert outside.start("killed").wait(120) == 0
    whole, killed = (read_json(tmp_path / name / "product.json") for name in ("whole", "killed"))
    assert whole["sha256"] == killed["sha256"]
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 17

    from pathme_jax.encoders.extraction import extract_fields

    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    done = extract_fields(grid_dir, [tmp_path / "killed"], mpps=[2.0], progress=False)
    assert done.done == 4 and not done.errors


def test_the_product_is_the_teacher_of_the_last_checkpoint_and_a_finished_run_is_left_alone(
    config: ConfigDict, tmp_path: Path
):
    whole = train(config, tmp_path / "whole", progress=False)
    _, _, product, _ = load_product(whole)
    saver = ocp.CheckpointManager((whole / "checkpoints").absolute())
    saved = saver.restore(saver.latest_step(), args=ocp.args.StandardRestore())
    saver.close()
    teacher = {
        k.removeprefix("teacher/backbone/"): v for k, v in saved["ema"].items() if "backbone" in k
    }
    assert fingerprint(product) == fingerprint(loop.checkpoints.nested(teacher))
    student = {k: saved["trained"][k.replace("teacher/", "student/")] for k in saved["ema"]}
    start = "teacher/backbone/"  # where teacher and student were equal
    student = {k.removeprefix(start): v for k, v in student.items() if k.startswith(start)}
    assert fingerprint(product) != fingerprint(loop.checkpoints.nested(student))
    before = (whole / "product.json").stat().st_mtime_ns
    train(config, whole, progress=False)
    assert (whole / "product.json").stat().st_mtime_ns == before
    config.optimiser.lr = 0.5
    with pytest.raises(UserError, match=r"config/optimiser/lr: 0.002 then, 0.5 now"):
        train(config, whole, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_so(outside, tmp_path, monkeypatch):
    config = outside.here(monkeypatch)
    config.optimiser.lr = float("nan")
    with pytest.raises(UserError, match="not finite"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "product.json").exists()


def test_a_checkpoint_of_another_architecture_is_refused(outside, tmp_path, monkeypatch):
    config = outside.here(monkeypatch)
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
    config = outside.here(monkeypatch)
    config.steps = 5
    run = train(config, tmp_path / "run", progress=False)
    about = read_json(run / "product.json")
    (run / "product.json").write_text(json.dumps({**about, "sha256": "0" * 64}))
    with pytest.raises(UserError, match="differ from those"):
        load_product(run)
    with pytest.raises(UserError, match="no finished training run"):
        load_product(tmp_path)


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
