"""Jobs spread over processes: one that takes its process down is found and named."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2
from tqdm import tqdm

J = TypeVar("J")


def each(
    work: Callable[[J], Any],
    jobs: Sequence[J],
    *,
    crashed: Callable[[J], Any],
    workers: int,
    progress: bool,
    label: str = "tile",
) -> list[Any]:
    """`work(job)` of every job, in any order.

    Args:
        crashed: what to return for a job whose process died (no memory, a corrupt file in a decoder).
        workers: processes; 0 or 1 works in this one.
        label: of the progress bar.
    """
    with tqdm(total=len(jobs), desc=label, unit="slide", disable=not progress) as bar:
        if workers <= 1 or len(jobs) <= 1:
            results = []
            for job in jobs:
                results.append(work(job))
                bar.update()
            return results
        results, lost = _spread(work, jobs, workers, bar)
        # A dead process takes the whole pool with it. Which job it was shows when each runs alone.
        for job in lost:
            alone, dead = _spread(work, [job], 1, bar)
            results += alone
            if dead:
                results.append(crashed(job))
                bar.update()
        return results


def _spread(
    work: Callable[[J], Any], jobs: Sequence[J], workers: int, bar: tqdm
) -> tuple[list[Any], list[J]]:
    """Results, and the jobs that were lost with a broken pool."""
    results, lost = [], []
    with concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),  # forks and threads do not mix
        initializer=started,
        initargs=(os.getpid(),),
    ) as pool:
        futures = {pool.submit(work, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                try:
                    results.append(future.result())
                    bar.update()
                except BrokenProcessPool:
                    lost.append(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results, lost


def started(parent: int, *_: int) -> None:
    """First thing a worker does: OpenCV gets one thread, and a killed parent ends it."""
    cv2.setNumThreads(1)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """Ends this worker when its parent was killed, which gave it no chance to say so."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
