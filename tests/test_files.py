"""Nothing half-written is left that a rerun would take for done; errors are one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pathme_jax import files
from pathme_jax.errors import UserError, launcher
from pathme_jax.files import (
    atomic,
    digest,
    full_disk_told,
    listed,
    read_csv,
    read_json,
    write_csv,
    write_json,
)


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
    here = files._place()
    left = tmp_path / f".a.{here}-{dead.pid}-5eed.tmp.json"
    earlier = tmp_path / f".a.{here}-{os.getpid()}-5eed.tmp.json"
    busy = tmp_path / f".a.{here}-{os.getppid()}-5eed.tmp.json"
    elsewhere = tmp_path / f".a.other-{dead.pid}-5eed.tmp.json"
    another = tmp_path / f".a.b.{here}-{dead.pid}-5eed.tmp.json"
    for path in (left, earlier, busy, elsewhere, another):
        path.write_text("half")
    write_json(tmp_path / "a.json", 2)
    assert not left.exists() and not earlier.exists()
    assert busy.exists() and elsewhere.exists() and another.exists()


def test_what_is_being_written_is_not_listed(tmp_path: Path):
    write_json(tmp_path / "b.json", 1)
    write_json(tmp_path / "a.json", 1)
    with atomic(tmp_path / "c.json") as temporary:
        temporary.touch()
        assert [path.name for path in listed(tmp_path, ".json")] == ["a.json", "b.json"]
    assert listed(tmp_path / "absent", ".json") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize(
    "said", ["RESOURCE_EXHAUSTED: {0}; write() failed", "file write failed: error message = '{0}'"]
)
def test_a_full_disk_or_quota_is_known_by_the_words_of_those_who_write(number, said):
    with pytest.raises(OSError) as caught, full_disk_told("x.h5"):
        raise RuntimeError(said.format(os.strerror(number)))
    assert (caught.value.errno, caught.value.filename) == (number, "x.h5")
    with pytest.raises(RuntimeError, match="else"), full_disk_told("x.h5"):
        raise RuntimeError("something else")


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
