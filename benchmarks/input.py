"""What the host delivers: windows per core-second of our pipeline, of a torch DataLoader, of raw decoding.

    python benchmarks/input.py [--fields OUT/20x-…] [--mpps 0.5,1,2] [--workers 0,1,2]

Raw decoding is simplejpeg alone on the same JPEGs, already in memory, times the windows cut from a field:
what a pipeline would deliver if all else were free. The torch DataLoader reads the same records and
cuts the same windows; its rows are left out where torch is not installed. Everything runs in turn,
`--repeats` times; a ratio is taken within a repeat, the table gives its median and range. A core-second
is CPU time of this process and its workers, so that other jobs on the machine count little.
Without --fields a synthetic cohort is drawn into a temporary folder first.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pathme_jax.data.pipeline import batches, cut_windows, open_source
from pathme_jax.records import fields
from pathme_jax.training.contract import BatchSpec

RAW = "raw decode"


class TorchFields:
    """A map-style torch dataset: record i, and the windows cut from it."""

    def __init__(self, folder: Path, spec: BatchSpec):
        self.source: Any = open_source(folder, spec)
        self.spec = spec

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        windows = empty(self.spec)
        mpps = cut_windows(
            self.source[index], self.spec.mpps, windows, np.random.default_rng(index)
        )
        return {"window": windows, "mpp": mpps}


def empty(spec: BatchSpec) -> np.ndarray:
    return np.empty((spec.windows_per_field, spec.window_px, spec.window_px, 3), np.uint8)


def torch_batches(folder: Path, spec: BatchSpec, workers: int) -> Iterator[Any]:
    """Endless shuffled batches as a torch user would write them."""
    import torch
    from torch.utils.data import DataLoader, RandomSampler

    torch.set_num_threads(1)  # its threads would spin while this one decodes

    dataset: Any = TorchFields(folder, spec)
    loader = DataLoader(
        dataset,
        batch_size=spec.samples // spec.windows_per_field,
        sampler=RandomSampler(dataset, replacement=True, num_samples=10**7),
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # as Grain's; JAX has threads
        prefetch_factor=2 if workers else None,
    )
    for batch in loader:
        yield {k: v.reshape(spec.samples, *v.shape[2:]) for k, v in batch.items()}


def raw_batches(folder: Path, spec: BatchSpec) -> Iterator[None]:
    """As many threads as the pipeline has, since two busy cores are each slower than one."""
    source: Any = open_source(folder, spec)
    chosen = np.random.default_rng(0).permutation(len(source))[:64]
    jpegs = [source[int(i)]["image"] for i in chosen]

    def decode(jpeg: bytes) -> None:
        fields.decode(jpeg)  # and forget it: keeping pixels would cost fresh memory

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for start in itertools.count(0, spec.samples // spec.windows_per_field):
            some = range(start, start + spec.samples // spec.windows_per_field)
            for _ in threads.map(decode, [jpegs[i % len(jpegs)] for i in some]):
                pass
            yield None


def cpu_seconds() -> float:
    """CPU time so far of this process and its living children."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(stream: Iterator[Any], skip: int, count: int) -> tuple[float, float]:
    """(wall, CPU) seconds of `count` batches, after `skip` that may have been read ahead."""
    for _ in range(skip):
        next(stream)
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        next(stream)
    return time.perf_counter() - wall, cpu_seconds() - cpu


def parts(folder: Path, spec: BatchSpec, count: int = 64) -> dict[str, float]:
    """Milliseconds of CPU a field costs in one thread, by part."""
    source: Any = open_source(folder, spec)
    chosen = [int(i) for i in np.random.default_rng(0).permutation(len(source))[:count]]
    records = [source[i] for i in chosen]
    rng = np.random.default_rng(0)

    def cost(work: Callable[[Any], Any], items: list[Any]) -> float:
        found = []
        for _ in range(5):
            started = time.thread_time()
            for item in items:
                work(item)
            found.append(time.thread_time() - started)
        return float(np.median(found)) / len(items) * 1e3

    windows = empty(spec)
    decode = cost(lambda record: fields.decode(record["image"]), records)
    cut = cost(lambda record: cut_windows(record, spec.mpps, windows, rng), records)
    return {
        "decode": decode,
        "read and parse": cost(lambda i: source[i], chosen),
        "cut": cut - decode,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fields", type=Path, help="folder that data_prep.tile wrote")
    parser.add_argument("--window", type=int, default=256, help="px")
    parser.add_argument("--mpps", default="0.5,1,2", help="µm/px a window is drawn at")
    parser.add_argument("--windows-per-field", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64, help="windows")
    parser.add_argument("--batches", type=int, default=10, help="timed at a time")
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    mpps = tuple(float(mpp) for mpp in args.mpps.split(","))
    spec = BatchSpec("fields", args.batch, args.window, mpps, args.windows_per_field)

    with contextlib.ExitStack() as stack:
        folder = args.fields
        if folder is None:
            from pathme_jax.slides import tile
            from pathme_jax.synthetic.cohort import write_cohort

            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            cohort = write_cohort(work / "cohort", slides=8, size=4096, seed=0, progress=False)
            folder = tile.run(cohort / "slides", work / "tiles", progress=False).grid_dir

        streams: dict[str, Any] = {RAW: raw_batches(folder, spec)}
        for workers in (int(n) for n in args.workers.split(",")):
            streams[f"pathme_jax, {workers} workers"] = batches(
                folder, spec, seed=0, workers=workers
            )
            if importlib.util.find_spec("torch"):
                streams[f"torch DataLoader, {workers} workers"] = torch_batches(
                    folder, spec, workers
                )
        # What workers read ahead while others were timed must not count.
        ahead = 8 + 64 * spec.windows_per_field // spec.samples
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in streams}
        for _ in range(args.repeats):
            for name, stream in streams.items():
                times[name].append(measure(stream, ahead, args.batches))
        for stream in streams.values():
            stream.close()

        windows = args.batches * spec.samples
        rates = {name: windows / np.array(pairs) for name, pairs in times.items()}
        print(
            f"{len(open_source(folder, spec))} fields, {spec.samples} windows of {spec.window_px} px"
            f" a batch, {spec.windows_per_field} a field at {args.mpps} µm/px; {os.cpu_count()} cores;"
            f" {args.repeats} repeats of {args.batches} batches\n"
        )
        print("| | windows/s | windows per core-second | of raw decode |\n|---|---|---|---|")
        for name, rate in rates.items():
            ratio = rate[:, 1] / rates[RAW][:, 1]
            print(
                f"| {name} | {np.median(rate[:, 0]):.0f} | {np.median(rate[:, 1]):.0f} |"
                f" {np.median(ratio):.2f} ({ratio.min():.2f}–{ratio.max():.2f}) |"
            )
        costs = ", ".join(f"{k} {v:.2f}" for k, v in parts(folder, spec).items())
        print(f"\nCPU ms a field in one thread: {costs}")


if __name__ == "__main__":
    main()
