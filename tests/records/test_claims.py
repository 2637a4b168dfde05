"""Claims on slides: one holder at a time, and none of the dead."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pathme_jax.records import claims
from pathme_jax.records.claims import Claims


@pytest.fixture
def dead() -> str:
    """The owner's name of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{platform.node()}-{process.pid}"


@pytest.fixture
def ours(tmp_path: Path):
    made = Claims(tmp_path / "claims")
    with made.living():
        yield made


@pytest.fixture
def other(ours: Claims):
    """Another living process: this one's parent."""
    made = Claims(ours.folder, f"{platform.node()}-{os.getppid()}")
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
    distant = Claims(ours.folder, "elsewhere.example-7")
    distant._beat(distant.owner)
    assert distant.take("a") and not ours.take("a") and ours.held("a")


def test_of_many_that_try_at_once_one_gets_the_slide(ours, dead):
    assert Claims(ours.folder, dead).take("a")
    rivals = [Claims(ours.folder, f"host{i}-1") for i in range(16)]
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
    other = Claims(ours.folder, f"{platform.node()}-{os.getppid()}")
    with ours.living():
        other._beat(other.owner)
        ours.take("a"), other.take("b")
    assert sorted(p.name for p in ours.folder.iterdir()) == ["b.0", f"{other.owner}.alive"]


def test_the_slide_a_dead_worker_read_is_known(ours, dead):
    ours.reading("fine")
    ours._trace(int(dead.rpartition("-")[2])).write_text("deadly.slide")
    assert ours.lost() == ["deadly.slide"]
