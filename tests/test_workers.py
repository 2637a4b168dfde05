"""A job that takes its process down is named, and costs no other job."""

import os
import signal

import pytest

from pathme_jax.workers import each


def work(job: int) -> str:
    if job < 0:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
    if job > 9:
        raise ValueError(job)
    return f"done {job}"


def crashed(job: int) -> str:
    return f"crashed {job}"


@pytest.mark.parametrize("workers", [0, 1])
def test_one_process_works_in_order(workers):
    results = each(work, [2, 1], crashed=crashed, workers=workers, progress=False)
    assert results == ["done 2", "done 1"]


def test_a_dying_worker_is_found_and_the_others_finish():
    jobs = [1, -5, 2, 3]
    results = each(work, jobs, crashed=crashed, workers=2, progress=False)
    assert sorted(results) == ["crashed -5", "done 1", "done 2", "done 3"]


def test_an_error_ends_the_run():
    with pytest.raises(ValueError, match="10"):
        each(work, [1, 10, 2, 3], crashed=crashed, workers=2, progress=False)
