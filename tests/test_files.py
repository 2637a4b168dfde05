"""Nothing half-written is left that a rerun would take for done; errors are one line."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pathme_jax.errors import UserError, launcher
from pathme_jax.files import atomic, digest, read_csv, read_json, write_csv, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_replaces_a_folder(tmp_path: Path):
    for name in ("one", "two"):
        with atomic(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["two"]


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    node = platform.node()
    left = tmp_path / f".a.{node}-{dead.pid}.tmp.json"
    busy = tmp_path / f".a.{node}-{os.getppid()}.tmp.json"
    elsewhere = tmp_path / f".a.other-{dead.pid}.tmp.json"
    for path in (left, busy, elsewhere):
        path.write_text("half")
    write_json(tmp_path / "a.json", 2)
    assert not left.exists() and busy.exists() and elsewhere.exists()


def test_csv_and_digest(tmp_path: Path):
    write_csv(tmp_path / "t.csv", [{"a": 1, "b": "x,y", "c": 3}], ["a", "b"])
    assert read_csv(tmp_path / "t.csv") == [{"a": "1", "b": "x,y"}]
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("x.svs: no mpp", "Give --mpp-csv"), "error: x.svs: no mpp. Give --mpp-csv\n"),
        (OSError(errno.ENOSPC, "full", "/d/x.h5"), "error: no space left writing /d/x.h5. "),
    ],
)
def test_what_a_user_can_cure_is_one_line_and_exit_code_2(error, expected, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        launcher(main)()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(expected)


def test_a_bug_is_not_dressed_up_as_a_users_error():
    def main():
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        launcher(main)()
