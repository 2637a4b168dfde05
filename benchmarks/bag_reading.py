"""How long a slide's features take to read, by the layout they are stored in.

    python benchmarks/bag_reading.py [--rows 15000 --width 1536 --repeats 15]

"h5py" is what users of these files write, `file["features"][:]`; "read_features" is ours, with its
check that every value is finite, and gives float32 unless the row says that float16 is kept. Every row
is read in turn, `--repeats` times, from a warm page cache, and the second of two reads is timed: in a
loop over slides one bag takes the memory that another gave back. The table gives medians and the range,
and how many times as long chunks of one row take with h5py. Files lie in a temporary folder (--dir:
another disk).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pathme_jax.records.features import coordinate_attrs, read_features, write_features

YARDSTICK = "TRIDENT, chunks (1, D), h5py"


def write(folder: Path, rows: int, width: int) -> None:
    """The same values in every layout."""
    values = np.random.default_rng(0).standard_normal((rows, width), np.float32)
    cells = np.argwhere(np.ones((rows, 1), bool))
    attrs = coordinate_attrs(slide_id="s", mpp=0.5, slide_mpp=0.25, level0_size=(512, 512 * rows))
    attrs |= {"encoder": "e", "recipe": ""}
    for dtype in (np.float32, np.float16):
        write_features(
            folder / f"ours_{np.dtype(dtype).name}.h5",
            features=values.astype(dtype),
            coords=cells[:, ::-1] * 512,
            grid=cells,
            attrs=attrs,
        )
    for name, chunk in (("trident", 1), ("clam", 32)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            shape, most = (chunk, width), (None, width)
            file.create_dataset("features", data=values, chunks=shape, maxshape=most)
            file["coords"] = cells[:, ::-1] * 512


def plain(path: Path) -> Any:
    with h5py.File(path) as file:
        dataset: Any = file["features"]
        return dataset[:]


def readers(folder: Path) -> dict[str, Callable[[], Any]]:
    ours32, ours16 = folder / "ours_float32.h5", folder / "ours_float16.h5"
    trident, clam = folder / "trident.h5", folder / "clam.h5"
    return {
        YARDSTICK: lambda: plain(trident),
        "CLAM, chunks (32, D), h5py": lambda: plain(clam),
        "ours float32, h5py": lambda: plain(ours32),
        "ours float16, h5py": lambda: plain(ours16),
        "ours float32, read_features": lambda: read_features(ours32),
        "ours float16, read_features, to float32": lambda: read_features(ours16),
        "ours float16, read_features, kept": lambda: read_features(ours16, dtype=None),
        "TRIDENT, chunks (1, D), read_features": lambda: read_features(trident),
        "CLAM, chunks (32, D), read_features": lambda: read_features(clam),
    }


def measure(folder: Path, repeats: int) -> dict[str, np.ndarray]:
    """(repeats,) milliseconds of each reader; a first round, not counted, fills the cache."""
    rows = readers(folder)
    times = {name: np.zeros(repeats + 1) for name in rows}
    for repeat in range(repeats + 1):
        for name, read in rows.items():
            read()
            start = time.perf_counter()
            read()
            times[name][repeat] = 1e3 * (time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=15_000)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dir", type=Path, help="where the files are written for the time being")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        write(Path(folder), args.rows, args.width)
        times = measure(Path(folder), args.repeats)
    yardstick = times[YARDSTICK]
    print(f"{'':42}{'ms':>8}  {'range':>15}  {'faster':>7}")
    for name, values in times.items():
        spread = f"{values.min():.1f} to {values.max():.1f}"
        ratio = np.median(yardstick / values)
        print(f"{name:42}{np.median(values):8.1f}  {spread:>15}  {ratio:6.1f}x")


if __name__ == "__main__":
    main()
