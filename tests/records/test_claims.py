"""Claims on slides: one holder at a time, and none of the dead."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pathme_jax import files
from pathme_jax.records import claims
from pathme_jax.records.claims import Claims


@pytest.fixture
def dead() -> str:
    """The owner's name of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{files._place()}-{process.pid}-5eed"


def parent() -> str:
    """The owner's name of a living process."""
    return f"{files._place()}-{os.getppid()}-5eed"


@pytest.fixture
def ours(tmp_path: Path):
    made = Claims(tmp_path / "claims")
    with made.living():
        yield made


@pytest.fixture
def other(ours: Claims):
    """Another living process: this one's parent."""
    made = Claims(ours.folder, parent())
    made._beat(made.owner)
    return made


def test_a_slide_is_its_first_takers_until_it_is_released(ours, other):
    assert ours.take("a.1") and ours.take("a.1") and not other.take("a.1")
    assert other.held("a.1") and not ours.held("a.1")
    other.release("a.1")
    assert not other.take("a.1"), "another's claim is not released"
    ours.release("a.1")
    assert other.take("a.1") and ours.held("a.1")


def test_workers_claim_in_the_name_of_their_process(ours):
    again = Claims(ours.folder, ours.owner)
    assert ours.take("a") and again.take("a")


def test_a_dead_process_loses_its_slides(ours, other, dead):
    assert Claims(ours.folder, dead).take("a")
    assert not ours.held("a") and ours.take("a")
    assert not other.take("a"), "the next claim holds"
    assert ours.owners("a") == [dead, ours.owner]
    ours.release("a")
    assert other.take("a")


def test_silence_is_death_whatever_the_process_number_says(ours, other):
    """Another host's process, or one whose number was given to another."""
    assert other.take("a")
    long_ago = time.time() - claims.STALE - 60
    os.utime(ours.folder / f"{other.owner}.alive", (long_ago, long_ago))
    assert not ours.held("a") and ours.take("a")


def test_another_hosts_process_lives_while_it_beats(ours):
    distant = Claims(ours.folder, "elsewhere.example-7-5eed")
    distant._beat(distant.owner)
    assert distant.take("a") and not ours.take("a") and ours.held("a")


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="no PID namespaces here")
def test_a_process_of_another_container_with_a_dead_ones_number_lives_while_it_beats(
    ours, dead, monkeypatch
):
    """Containers may share a hostname, and number their processes apart."""
    inode = os.stat("/proc/self/ns/pid").st_ino
    other_namespace = os.stat_result((0, inode + 1, *range(8)))
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "stat", lambda _: other_namespace)
        place = files._place.__wrapped__()
    distant = Claims(ours.folder, f"{place}-{dead.split('-')[-2]}-5eed")
    distant._beat(distant.owner)
    assert distant.take("a") and not ours.take("a") and ours.held("a")


def test_an_earlier_process_of_our_number_is_dead(ours):
    assert Claims(ours.folder, f"{files._place()}-{os.getpid()}-5eed").take("a")
    assert ours.take("a") and ours.owners("a")[1:] == [ours.owner]


def test_the_owner_is_the_process_in_every_thread_and_not_its_fork():
    assert files.owner() == files.owner() == Claims(Path()).owner
    again = pickle.loads(pickle.dumps(Claims(Path())))
    assert again.owner == files.owner(), "workers get it with the claims"
    assert files._owner(1) != files._owner(2)


def test_a_beat_that_fails_is_not_the_last(tmp_path, monkeypatch):
    made, beats = Claims(tmp_path / "claims"), []

    def beat(self, owner):
        beats.append(owner)
        if len(beats) == 2:
            raise OSError(errno.ESTALE, "stale")

    monkeypatch.setattr(claims, "BEAT", 0.01)
    monkeypatch.setattr(Claims, "_beat", beat)
    with made.living():
        deadline = time.monotonic() + 10
        while len(beats) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(beats) >= 4


def test_a_folder_that_another_sweeps_meanwhile_is_made_again(tmp_path, monkeypatch):
    made, swept = Claims(tmp_path / "claims"), []
    touch = Path.touch

    def swept_before(path, *arguments):
        if len(swept) < 3:
            swept.append(path.parent.rmdir())
        touch(path, *arguments)

    monkeypatch.setattr(Path, "touch", swept_before)
    made._beat(made.owner)
    assert (made.folder / f"{made.owner}.alive").exists()


def test_of_many_that_try_at_once_one_gets_the_slide(ours, dead):
    assert Claims(ours.folder, dead).take("a")
    rivals = [Claims(ours.folder, f"host{i}-1-5eed") for i in range(16)]
    for rival in rivals:
        rival._beat(rival.owner)
    start = threading.Barrier(len(rivals))

    def take(rival: Claims) -> bool:
        start.wait()
        return rival.take("a")

    with ThreadPoolExecutor(len(rivals)) as pool:
        assert sum(pool.map(take, rivals)) == 1


def test_nothing_is_left_at_the_end_but_what_the_living_hold(tmp_path, dead):
    ours = Claims(tmp_path / "claims")
    with ours.living():
        ours.take("a")
        Claims(ours.folder, dead).take("b")
    assert not ours.folder.exists()
    other = Claims(ours.folder, parent())
    with ours.living():
        other._beat(other.owner)
        ours.take("a"), other.take("b")
    assert {p.name for p in ours.folder.iterdir()} == {"b.0", f"{other.owner}.alive"}


def test_the_slide_a_dead_worker_read_is_known(ours, dead):
    ours.reading("fine")
    ours._trace(int(dead.split("-")[-2])).write_text("deadly.slide")
    assert ours.lost() == ["deadly.slide"]
