"""Extraction beside the bare encoder: how much of its speed is left, and what memory it takes.

    python benchmarks/extraction.py                                   # ViT-S/16, for a CPU
    python benchmarks/extraction.py --encoders dinov2-large,dinov2-giant --batch 256 --side 16384

Bare: the compiled encoder over batches that lie on the device already, of the same shape. Encoders are rows of
the zoo with random weights. Slides are synthetic. Extraction's rate is that of its loop, from the first batch
it asks for to the last slide it writes; what finding tissue takes is given beside it. On a CPU that others
share, compare core-seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # configs, where the package is not installed

import jax
import numpy as np

from pathme_jax.data.stores import FieldStore, Store
from pathme_jax.encoders import extraction, patch, zoo
from pathme_jax.encoders.devices import Devices
from pathme_jax.encoders.encoder import Encoder
from pathme_jax.encoders.extraction import MPPS
from pathme_jax.records import features
from pathme_jax.slides import tile
from pathme_jax.synthetic.cohort import write_cohort
from pathme_jax.training.watch import peak_flops


def random_encoder(row: str, precision: str, seed: int = 0) -> Encoder:
    """A public encoder's architecture, input and output, with random parameters that let every block count."""
    definition = zoo.find(row)
    rng = np.random.default_rng(seed)

    def draw(path: Any, like: Any) -> np.ndarray:
        name, shape = jax.tree_util.keystr(path), like.shape
        values = rng.standard_normal(shape, np.float32)
        if "kernel" in name:
            return values / np.sqrt(shape[-2])
        return 1 + 0.1 * values if "scale" in name else 0.1 * values

    params = jax.tree_util.tree_map_with_path(draw, patch.abstract(definition))

    def apply(params: Any, batch: Any) -> Any:
        return patch.encode(definition, params, batch["image"], precision)

    return Encoder(f"{row}-{seed}", "fields", {}, params, apply, definition)


def bare(devices: Devices, name: str, batches: int) -> tuple[float, float]:
    """Tiles a second, and a core-second, of one encoder whose input is there."""
    shape = (devices.batch, devices.px, devices.px, 3)
    images = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    resident = {"image": jax.device_put(images, devices._sharding)}
    jax.block_until_ready(devices._apply[name](resident))
    started, cores = time.perf_counter(), time.process_time()
    for _ in range(batches):
        features = devices._apply[name](resident)
    jax.block_until_ready(features)
    tiles = batches * devices.batch
    return tiles / (time.perf_counter() - started), tiles / (time.process_time() - cores)


def extracted(
    store: Store, encoders: Sequence[Encoder], out: Path | None, args: argparse.Namespace
) -> tuple[extraction.Speed, float, float]:
    """The loop's speed, seconds before and after it, and tiles a core-second of the whole call."""
    started, cores = time.perf_counter(), time.process_time()
    done = extraction.extract(
        store, encoders, out=out, mpps=MPPS, batch=args.batch, workers=args.workers, progress=False
    )
    assert not done.errors, done.errors
    beside = time.perf_counter() - started - done.speed.seconds
    return done.speed, beside, done.speed.tiles / (time.process_time() - cores)


def _mfu(flops: float) -> str:
    peak = peak_flops(jax.local_devices()[0])
    return f"{flops / peak / jax.local_device_count():.1%}" if peak else ""


def agreement(a: Path, b: Path) -> float:
    """The least cosine between a row of a slide's features and the same row elsewhere."""
    least = 1.0
    for path in a.rglob("features_*/*.h5"):
        x = features.read_features(path).features
        y = features.read_features(b / path.relative_to(a)).features
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        least = min(least, float(((x * y).sum(1) / norms).min(initial=1)))
    return least


def peak_memory(folder: Path, workers: int) -> float:
    """GB of resident memory at the most while one process extracts mean colours of a folder of slides."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--memory-of", str(folder), out, str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) / 2**20


def memory_of(folder: str, out: str, workers: str) -> None:
    extraction.extract_slides(
        folder, out, ["mean_rgb"], mpps=MPPS, batch=32, workers=int(workers), progress=False
    )
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--encoders", default="gigapath-flash,kaiko-s16,lunit-s16", help="rows of the zoo")
    add("--slides", type=int, default=4)
    add("--side", type=int, default=8192, help="of a slide, px at 0.5 µm")
    add("--batch", type=int)
    add("--workers", type=int)
    add("--batches", type=int, default=10, help="of the bare encoder, timed at once")
    add("--repeats", type=int, default=3)
    add(
        "--sides", default="4096,16384", help="of the slides whose peak memory is compared, or none"
    )
    add("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return memory_of(*args.memory_of)

    chosen = extraction.choose(batch=args.batch, workers=args.workers)
    rows = args.encoders.split(",")
    encoders = [random_encoder(row, chosen.precision, seed) for seed, row in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        cohort = write_cohort(work / "cohort", args.slides, args.side, progress=False) / "slides"
        grid = tile.run(cohort, work / "tiles", mpp=MPPS[0], progress=False).grid_dir
        stored = FieldStore(grid)
        tiles = sum(slide.count(k) for slide in stored.sizes() for k in stored.multiples)
        device = jax.local_devices()[0]
        print(
            f"{device.device_kind} x {jax.local_device_count()}, jax {jax.__version__}; {args.slides}"
            f" slides, {tiles} tiles; batch {chosen.batch}, {chosen.precision},"
            f" {chosen.workers} workers\n"
        )
        head = "tiles/s | of bare | tiles/core-s | of bare | data-wait | s beside | MFU |"
        print(f"| | {head}\n|{'---|' * 8}")
        least = 1.0
        for repeat in range(args.repeats):
            # In turn, so that a machine that slows down slows all.
            devices = Devices(encoders, chosen.batch, stored.tile_px)
            bares = {one.name: bare(devices, one.name, args.batches) for one in encoders}
            for name, (rate, core_rate) in bares.items():
                mfu = _mfu(rate * devices._flops[name] / devices.batch)
                print(f"| bare {name} | {rate:.1f} | | {core_rate:.2f} | | | | {mfu} |")
            del devices
            for kind in ("fields", "slides"):
                for some in ([encoders[0]], encoders)[: 1 + (len(encoders) > 1)]:
                    out = work / f"{kind}-{len(some)}-{repeat}"
                    store, beside = (
                        (stored, out)
                        if kind == "fields"
                        else (extraction.slide_store(cohort, out, MPPS), None)
                    )
                    speed, more, core_rate = extracted(store, some, beside, args)
                    alone, core_alone = (
                        1 / sum(1 / bares[one.name][i] for one in some) for i in (0, 1)
                    )
                    mfu = "" if speed.mfu is None else f"{speed.mfu:.1%}"
                    print(
                        f"| from {kind}, {len(some)} in one pass | {speed.rate:.1f} |"
                        f" {speed.rate / alone:.3f} | {core_rate:.2f} | {core_rate / core_alone:.3f} |"
                        f" {speed.data_wait:.1%} | {more:.1f} | {mfu} |",
                        flush=True,
                    )
            least = min(least, agreement(work / f"fields-1-{repeat}", work / f"slides-1-{repeat}"))
        print(f"\nleast cosine of a tile's features, from fields and from slides: {least:.5f}")
        for side in [int(side) for side in args.sides.split(",") if side != "none"]:
            big = write_cohort(work / str(side), 1, side, slides_per_case=1, progress=False)
            gb = peak_memory(big / "slides", chosen.workers)
            print(f"peak memory, one slide of {side} px a side: {gb:.2f} GB")


if __name__ == "__main__":
    main()
