"""What goes wrong in a long run: one clear line each, exit code 2, and nothing lost that was saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pathme_jax.errors import UserError
from pathme_jax.files import read_json
from pathme_jax.training.loop import train
from pathme_jax.training.workdir import alone


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_a_nan_planted_at_a_step_is_named_and_what_was_saved_stays(outside, tmp_path: Path):
    """Steps between logged ones are looked at too, and no state after the NaN is saved."""
    outside.config.nan_at = 12  # neither logged nor saved
    line = outside.refused("run")
    assert line.startswith("error: step 12: loss") and "not finite" in line
    assert checkpoints(tmp_path / "run") == [5, 10]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 5, 10]
    assert not (tmp_path / "run" / "product.json").exists()


def test_a_nan_at_the_step_of_a_checkpoint_is_not_saved(outside, tmp_path: Path):
    outside.config.nan_at = 9  # the update that checkpoint 10 would hold
    assert "step 9: " in outside.refused("run")
    assert checkpoints(tmp_path / "run") == [5]


def test_a_misspelt_key_is_named(outside):
    line = outside.refused("run", "--config.optimiser.leaning_rate=1")
    assert "leaning_rate" in line


def test_a_wrong_setting_is_named_and_does_not_claim_the_folder(outside, tmp_path: Path):
    """The corrected command must not be told that the folder holds another run."""
    outside.config.log_every = 0
    assert "config.log_every = 0" in outside.refused("run")
    outside.config.log_every, outside.config.mesh = 5, {"data": 3}
    assert "does not make 1 devices" in outside.refused("run")
    outside.config.mesh = {"data": 1}
    assert outside.start("run").wait(120) == 0


def test_a_folder_takes_one_run_at_a_time(outside, tmp_path: Path, monkeypatch):
    config = outside.here(monkeypatch)
    with alone(tmp_path / "run"), pytest.raises(UserError, match="another process is training"):
        train(config, tmp_path / "run", progress=False)
    assert "--processes without --coordinator" in outside.refused("run", "--processes", "2")


def test_a_missing_shard_is_named(outside, tmp_path: Path):
    grid = tmp_path / "grid"
    shutil.copytree(outside.config.data.path, grid)
    outside.config.data.path = str(grid)
    gone = next((grid / "fields").glob("*.array_record"))
    gone.unlink()
    line = outside.refused("run")
    assert gone.name in line and "data_prep.tile" in line


def test_a_damaged_checkpoint_is_named_and_the_one_before_still_goes_on(
    outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every file of the newest checkpoint truncated: refused, with the cure; the cure works."""
    config = outside.here(monkeypatch)
    config.steps = 12
    whole = train(config, tmp_path / "whole", progress=False)
    run = train(config, tmp_path / "run", progress=False)
    for path in (run / "product.json", *(run / "checkpoints" / "12" / "default" / "d").glob("*")):
        path.write_bytes(b"") if path.suffix != ".json" else path.unlink()
    with pytest.raises(UserError, match=r"checkpoints/12 cannot be restored.*Delete that step"):
        train(config, run, progress=False)
    shutil.rmtree(run / "checkpoints" / "12")
    train(config, run, progress=False)
    products = [read_json(folder / "product.json")["sha256"] for folder in (whole, run)]
    assert products[0] == products[1]


def test_a_half_written_checkpoint_is_not_taken_for_one(
    outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a kill leaves while Orbax writes: a folder under its temporary name."""
    config = outside.here(monkeypatch)
    config.steps = 12
    run = train(config, tmp_path / "run", progress=False)
    sha256 = read_json(run / "product.json")["sha256"]
    (run / "product.json").unlink()
    saved = run / "checkpoints"
    (saved / "12").rename(saved / "12.orbax-checkpoint-tmp")
    train(config, run, progress=False)
    assert read_json(run / "product.json")["sha256"] == sha256
    assert checkpoints(run)[-1] == 12


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails, as on a full disk
from pathme_jax.training import checkpoints
save = checkpoints.save
def save_on_a_full_disk(manager, step, state):
    if step >= 10:
        checkpoints.finish(manager)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    save(manager, step, state)
checkpoints.save = save_on_a_full_disk
import runpy
sys.argv = sys.argv[1:]
runpy.run_module("pathme_jax.train", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(outside, tmp_path: Path):
    line = outside.refused("run", launcher=FULL)
    assert "could not be written" in line or "no space left" in line
    assert checkpoints(tmp_path / "run") == [5]
    assert [outside.start(name).wait(120) for name in ("run", "whole")] == [0, 0]
    products = [read_json(tmp_path / name / "product.json")["sha256"] for name in ("whole", "run")]
    assert products[0] == products[1]


def test_no_compilation_after_the_second_step(outside, tmp_path: Path, monkeypatch):
    """The step is compiled ahead and cannot recompile; nor may anything else in the loop compile."""
    import jax.monitoring

    config = outside.here(monkeypatch)
    config.steps = 30
    config.profile = {"first": 5, "steps": 3}
    seen: list[int] = []
    at = {"step": -1}
    from pathme_jax.training import loop

    real = loop._agreed

    def agreed(told, done):
        at["step"] = done
        return real(told, done)

    monkeypatch.setattr(loop, "_agreed", agreed)

    def listen(name, seconds, **_):
        if "backend_compile" in name and 2 < at["step"] < config.steps:
            seen.append(at["step"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(config, tmp_path / "run", progress=False)
    finally:
        jax.monitoring.clear_event_listeners()
    assert at["step"] == 30 and not seen
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_run_starts_from_the_weights_of_another(
    outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Student and teacher begin as that run's product; another architecture is refused by name."""
    config = outside.here(monkeypatch)
    config.steps = 5
    first = train(config, tmp_path / "first", progress=False)
    config.steps = 0
    config.initial = {"into": "student", "path": str(first)}
    second = train(config, tmp_path / "second", progress=False)
    products = [read_json(folder / "product.json")["sha256"] for folder in (first, second)]
    assert products[0] == products[1]
    assert "student" in read_json(second / "config.json")["identity"]["initial"]
    config.initial = {"into": "student/deeper", "path": str(first)}
    with pytest.raises(UserError, match=r"config\.initial does not fit.*unknown"):
        train(config, tmp_path / "third", progress=False)
