"""The launchers from a user's side: installed as a wheel, run from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCHERS = [
    "data_prep.synthesize", "data_prep.tile", "data_prep.regions", "pathme_jax.train",
    "pathme_jax.extract", "pathme_jax.mil_train", "pathme_jax.demo", "pathme_jax.encoders",
    "pathme_jax.convert", "pathme_jax.export", "pathme_jax.evaluate",
    "pathme_jax.report", "pathme_jax.bundle", "pathme_jax.predict", "pathme_jax.compare",
]  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a non-editable install, beside stand-ins of tensorflow and torch that tell."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    subprocess.run([*command, str(ROOT)], check=True)
    heavy = tmp_path_factory.mktemp("heavy")
    for name in ("tensorflow", "torch"):
        (heavy / name).mkdir()
        (heavy / name / "__init__.py").write_text(f"raise SystemExit('{name} was imported')")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(heavy)])}


@pytest.mark.parametrize("module", LAUNCHERS)
def test_help_works_from_another_folder_without_tensorflow_or_torch(module, installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, "--help"],
        env=installed, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr[-500:]  # absl's --help exits with 1
    assert "usage" in done.stdout.lower() or "flags:" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded or "absl.flags" in loaded
    assert not {name for name in loaded if name.split(".")[0] in ("tensorflow", "torch")}


def test_training_imports_neither_tensorflow_nor_torch(installed, tmp_path):
    """Not only --help: everything a stage imports."""
    code = "import pathme_jax.workflow, pathme_jax.mil.crossval, pathme_jax.reports.page, sys;"
    code += "print([m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'torch')])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=installed, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["pathme_jax.extract", "--encoder", "uni", "--fields", "."], "uni is known"),
        (["pathme_jax.demo", "--slides", "absent", "--workdir", "w"], "belong together"),
        (["pathme_jax.demo", "--task", "grade", "--workdir", "w"], "no label of synthetic slides"),
        (
            [
                "pathme_jax.demo",
                "--slides",
                ".",
                "--labels",
                "no.csv",
                "--task",
                "x",
                "--workdir",
                "w",
            ],
            "no.csv: no such file",
        ),
        (["data_prep.regions", "--grid", ".", "--fine", "e"], "slides.csv"),
        (["data_prep.synthesize", "--out", "c", "--size", "1000"], "not a multiple"),
        (["data_prep.tile", "--slides", "absent", "--out", "o"], "absent"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, expected, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-800:]
    assert "Traceback" not in done.stderr and expected in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.optimizer.lr=1"], "optimiser"),  # with the key that was meant
        (["--config.model.remat=full"], "the config has no such key: remat"),
        (["--config.steps=many"], "many"),
        (["--config.data.path=absent"], "absent: no slides.csv"),
    ],
)
def test_a_wrong_config_value_is_named(arguments, expected, tmp_path):
    command = [sys.executable, "-m", "pathme_jax.train", "--workdir", "w", "--config"]
    done = subprocess.run(
        [*command, str(ROOT / "configs/dinov2_tiny.py"), *arguments],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-800:]
    assert "Traceback" not in done.stderr and expected in done.stderr


def test_a_dry_run_on_fake_devices_says_what_a_step_costs_and_starts_nothing(tmp_path):
    command = [sys.executable, "-m", "pathme_jax.train", "--dry-run", "--devices", "2"]
    command += ["--config", f"{ROOT / 'configs/dinov2_tiny.py'}:test", "--config.mesh.data=2"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    lines = done.stdout.splitlines()
    (kernel,) = [line for line in lines if line.startswith("student/backbone/patch_embed/kernel")]
    assert kernel.split()[1:6] == ["768x32", "trained", "0.5", "1", "0"]
    assert any(line.startswith("teacher/dino/prototypes") and " ema " in line for line in lines)
    for part in ("2 device(s)", "GFLOP a sample", "state a device", "all-reduce a step a device"):
        assert part in done.stdout
    assert not list(tmp_path.iterdir())
