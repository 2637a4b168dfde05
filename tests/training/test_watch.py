"""The log of a resumed run is that of one that never stopped, TensorBoard agrees, and the curves are drawn."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from pathme_jax.errors import UserError
from pathme_jax.training import watch
from pathme_jax.training.alarms import Alarm

ALARM = Alarm("collapse", "feature_std 0", "collapse", "Lower the learning rate")


def run(workdir, first, end):
    """Logs steps as a run would, with a probe of random weights before the first and one at step 5."""
    log = watch.Log(workdir, first)
    if first == 0:
        log.write(-1, {"probe/detail/knn_auroc": 0.5, "probe/detail/chance": 0.5}, {})
    for step in range(first, end):
        loss = {"loss": 1 / (step + 3), "loss/dino": 0.1, "grad_norm": 2.0}
        log.write(step, loss, {"data_wait": 0.1}, [ALARM] if step == 3 else [])
        if step == 4:
            log.write(step, {"probe/detail/knn_auroc": 0.7, "probe/detail/chance": 0.5}, {})
    log.close()


def scalars(workdir, name):
    events = EventAccumulator(str(workdir), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


@pytest.mark.parametrize("first", [0, 1, 5])
def test_a_resumed_run_logs_as_one_that_never_stopped(tmp_path, first):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, 0, 8)
    run(killed, 0, 7)
    run(killed, first, 8)
    for name in ("metrics.jsonl", "timing.jsonl", "alarms.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    for name in ("loss", "data_wait", "probe/detail/knn_auroc"):
        assert scalars(whole, name) == scalars(killed, name)


def test_lines_hold_what_was_logged(tmp_path):
    run(tmp_path, 0, 4)
    metrics = watch.read_log(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [-1, 0, 1, 2, 3]
    assert metrics[1] == {"step": 0, "loss": 0.333333, "loss/dino": 0.1, "grad_norm": 2.0}
    assert watch.read_log(tmp_path / "timing.jsonl")[0] == {"step": 0, "data_wait": 0.1}
    assert watch.read_log(tmp_path / "alarms.jsonl")[0]["cure"] == ALARM.cure
    assert scalars(tmp_path, "loss")[3] == (3, 0.166667)


def test_all_can_be_read_while_the_run_goes_on(tmp_path):
    log = watch.Log(tmp_path, 0)
    log.write(0, {"loss": 1.0}, {})
    assert scalars(tmp_path, "loss") == [(0, 1.0)]
    assert watch.read_log(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]
    log.close()


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    run(tmp_path, 0, 4)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 4, "lo')
    assert len(watch.read_log(tmp_path / "metrics.jsonl")) == 5
    watch.Log(tmp_path, 4).close()
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_only_process_0_writes(tmp_path):
    log = watch.Log(tmp_path / "run", 0, process=1)
    log.write(0, {"loss": 1.0}, {})
    log.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("full", ["metrics.jsonl", "events"])
def test_a_full_disk_is_an_error_at_once_not_silence(tmp_path, full):
    log = watch.Log(tmp_path, 0)
    if full == "events":
        log.close()
        log.events = RecordWriter(open("/dev/full", "wb", buffering=0))
    else:
        (tmp_path / full).unlink()
        (tmp_path / full).symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        log.write(0, {"loss": 1.0}, {})
    assert caught.value.errno == errno.ENOSPC
    log.close()


def test_logging_and_drawing_import_no_framework_even_where_it_is_installed(tmp_path):
    for name in ("torch", "tensorflow", "jax", "flax"):
        (tmp_path / "installed" / name).mkdir(parents=True)
        (tmp_path / "installed" / name / "__init__.py").write_text(f"raise SystemExit('{name}')")
    here = str(Path(__file__).parents[2])
    code = (
        "import sys; from pathme_jax.training import watch; log = watch.Log(sys.argv[1], 0);"
        "log.write(0, {'loss': 1.0}, {}); log.close(); watch.main([sys.argv[1]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'installed'}{os.pathsep}{here}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "curves.png").exists()


def test_curves_have_a_panel_for_all_that_is_logged_and_for_nothing_else(tmp_path):
    run(tmp_path, 0, 8)
    picture = cv2.imread(str(watch.curves(tmp_path)))
    assert picture is not None and picture.std() > 10
    names = {name for row in watch.read_log(tmp_path / "metrics.jsonl") for name in row}
    panels = watch._panels(sorted(names | {"data_wait"} - {"step"}))
    assert {title: list(wanted.values()) for title, _, wanted in panels} == {
        "loss": ["loss", "loss/dino"],
        "norms": ["grad_norm"],
        "probe of detail: accuracy": ["chance"],
        "probe of detail: auroc": ["knn_auroc"],
        "shares of time and peak": ["data_wait"],
    }


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        watch.curves(tmp_path)
    with pytest.raises(SystemExit) as caught:
        watch.main([str(tmp_path)])
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GB200", 2500),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("cpu", None),
        ("NVIDIA L400", None),
    ],
)
def test_peaks_by_the_names_jax_gives_devices(kind, tflops):
    found = watch.peak_flops(SimpleNamespace(device_kind=kind))
    assert found == (None if tflops is None else tflops * 1e12)


def test_values_are_plain_json(tmp_path):
    run(tmp_path, 0, 2)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert all(isinstance(value, int | float) for value in json.loads(line).values())
