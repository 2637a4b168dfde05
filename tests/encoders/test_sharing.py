"""Several processes on one folder, and processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pathme_jax.encoders.extraction import extract_slides
from pathme_jax.files import read_csv

SLIDES = 8


@pytest.fixture
def folder(tmp_path: Path, paint, write_tiff) -> Path:
    for i in range(SLIDES):
        write_tiff(tmp_path / "slides" / f"s{i}.tiff", paint(i))
    return tmp_path / "slides"


@pytest.fixture
def reference(folder: Path, tmp_path: Path) -> dict[str, bytes]:
    """What one process makes of these slides."""
    how = {"mpps": [0.5], "tile_px": 32, "batch": 64, "workers": 0, "progress": False}
    assert extract_slides(folder, tmp_path / "alone", ["hed_texture"], **how).done == SLIDES
    return made(tmp_path / "alone")


def made(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.rglob("features_*/*")}


def start(folder: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pathme_jax.extract", "--encoder", "hed_texture"]
    command += ["--tile-px", "32", "--mpp", "0.5", "--batch", "64", "--slides", str(folder)]
    command += ["--out", str(out), *(more or ("--workers", "0"))]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def encoded(process: subprocess.Popen[str]) -> int:
    """Slides that a process says it encoded; it must have ended well."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-800:]
    (line,) = [line for line in out.splitlines() if "slides encoded" in line]
    assert line.endswith("0 failed")
    return int(line.split()[0])


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.startswith(".")]


def test_two_processes_do_every_slide_once(folder, reference, tmp_path):
    out = tmp_path / "out"
    both = [start(folder, out), start(folder, out)]
    assert sum(encoded(process) for process in both) == SLIDES
    assert made(out) == reference and not leftovers(out)
    (table,) = out.glob("*/extraction.csv")
    assert [row["state"] for row in read_csv(table)] == ["done"] * SLIDES


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_a_killed_process_had_begun_is_done_by_the_other(workers, folder, reference, tmp_path):
    out = tmp_path / "out"
    doomed = start(folder, out, "--workers", workers)
    begun: list[Path] = []
    while not begun and doomed.poll() is None:
        begun = list(out.rglob("features_*/.*.tmp.h5"))  # in the middle of a slide
        time.sleep(0.001)
    os.kill(doomed.pid, signal.SIGSTOP)  # it holds what it has claimed
    other = start(folder, out, "--workers", workers)
    (grid,) = out.glob("20x-*")
    deadline = time.monotonic() + 60
    while not list((grid / "extraction").glob("s7.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert other.poll() is None, "it waits for the other's slides"
    doomed.kill()
    doomed.communicate()
    before = len(list((grid / "extraction").glob("*.json")))
    assert 0 < encoded(other) <= SLIDES and before < SLIDES
    assert made(out) == reference and not leftovers(out)


def test_slides_that_kill_their_reader_are_listed_and_stop_no_other(folder, tmp_path):
    """The decoder of s3 and s6 takes its process down, as a corrupt file does to some."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, signal
            from pathme_jax.data.stores import SlideStore
            from pathme_jax.encoders import extraction

            class Deadly(SlideStore):
                def field(self, slide_id, i):
                    if slide_id in ("s3", "s6") and i == 5:
                        os.kill(os.getpid(), signal.SIGSEGV)
                    return super().field(slide_id, i)

            if __name__ == "__main__":
                store = Deadly({str(folder)!r}, {str(tmp_path / "out")!r}, tile_px=32, field_px=128)
                print(extraction.extract(store, ["mean_rgb"], mpps=[0.5], workers=2))
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    assert f"{SLIDES - 2} slides encoded, 0 were done, 2 failed" in done.stdout
    for slide_id in ("s3", "s6"):
        assert f"{slide_id}: reading it ended the worker process" in done.stdout
    assert len(made(tmp_path / "out")) == SLIDES - 2 and not leftovers(tmp_path / "out")
