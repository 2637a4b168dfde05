"""Feature files: one HDF5 per slide, in TRIDENT's layout, so that TRIDENT, CLAM and torchmil read them.

    <grid>/{mag:g}x_{px}px_{overlap}px_overlap/patches/<slide>_patches.h5        coords
    <grid>/{mag:g}x_{px}px_{overlap}px_overlap/features_<encoder>/<slide>.h5     features, coords, grid
                                                                            [, kind][, name]

Datasets are contiguous: TRIDENT's own (1, D) chunks read five to ten times slower.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import itertools
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, full_disk_told

SPATIAL, PROMPT = 0, 1  # values of `kind`
_ROWS = 64
_ROOM = 1 << 20  # bytes, for attributes and HDF5's own
_SIGN_EXPONENT_MANTISSA = np.uint32(0x8FFFE000).view(np.int32)  # where float16's bits come to lie


@dataclasses.dataclass
class Bag:
    """One slide's instances.

    Attributes:
        slide_id: file stem.
        features: (m, d) float32, or what the reader asked for.
        coords: (m, 2) int64, level-0 x, y of each instance's top left corner.
        grid: (m, 2) int32 row, column on this magnification's grid, or None in foreign files.
        kind: (m,) uint8, SPATIAL or PROMPT.
        attrs: attributes of `coords` and `features` merged, numbers as Python numbers.
    """

    slide_id: str
    features: np.ndarray
    coords: np.ndarray
    grid: np.ndarray | None
    kind: np.ndarray
    attrs: dict[str, Any]


def magnification(mpp: float) -> float:
    """The objective power that users call this µm/px by: 0.5 is 20x, 2 is 5x, 8 is 1.25x."""
    return 10.0 / mpp


def grid_name(mpp: float, recipe: Mapping[str, Any]) -> str:
    """The folder of all that was made under a recipe: 20x-1a2b3c4d."""
    return f"{magnification(mpp):g}x-{digest(recipe)}"


def folder_name(mpp: float, px: int = 256, overlap: int = 0) -> str:
    """TRIDENT's folder for tiles of `px` pixels at `mpp`: 20x_256px_0px_overlap."""
    return f"{magnification(mpp):g}x_{px}px_{overlap}px_overlap"


def write_coords(path: str | Path, coords: np.ndarray, attrs: dict[str, Any]) -> None:
    """Writes `patches/<slide>_patches.h5`. `attrs`: TRIDENT's, see `coordinate_attrs`."""
    with atomic(path) as temporary, full_disk_told(path), h5py.File(temporary, "w") as file:
        file.create_dataset("coords", data=np.asarray(coords, np.int64)).attrs.update(attrs)


def coordinate_attrs(
    *, slide_id: str, mpp: float, slide_mpp: float, level0_size: tuple[int, int], px: int = 256
) -> dict[str, Any]:
    """The attributes TRIDENT keeps on `coords`, plus the exact µm/px they round."""
    return {
        "patch_size": px,
        "patch_size_level0": round(px * mpp / slide_mpp),
        "level0_magnification": round(magnification(slide_mpp), 2),
        "target_magnification": magnification(mpp),
        "overlap": 0,
        "name": slide_id,
        "savetodir": "",
        "level0_width": int(level0_size[0]),
        "level0_height": int(level0_size[1]),
        "mpp": float(mpp),
        "level0_mpp": float(slide_mpp),
    }


def level0(grid: np.ndarray, cell_um: float, slide_mpp: float) -> np.ndarray:
    """Row, column to level-0 x, y: each rounded from µm by itself, so that no step drifts."""
    return np.round(np.asarray(grid)[:, ::-1] * cell_um / slide_mpp).astype(np.int64)


class FeatureFile:
    """One slide's features while they come in, some rows at a time: in memory there are never more.

    `features`, `coords` and `grid` are contiguous datasets of the full size from the start.
    """

    def __init__(self, file: h5py.File, name: str, rows: int, width: int, dtype: npt.DTypeLike):
        self.file, self.name, self.rows, self.filled = file, name, rows, 0
        self._features = file.create_dataset("features", (rows, width), dtype)
        self._coords = file.create_dataset("coords", (rows, 2), np.int64)
        self._grid = file.create_dataset("grid", (rows, 2), np.int32)

    def append(self, features: np.ndarray, coords: np.ndarray, grid: np.ndarray) -> None:
        """The next rows: (n, width), (n, 2) and (n, 2).

        Raises:
            UserError: a feature is not finite, or not in the stored type; more rows than announced.
        """
        if not len(features) == len(coords) == len(grid):
            raise self._miscounted(
                f"{len(features)} features, {len(coords)} coordinates, {len(grid)} cells"
            )
        start, self.filled = self.filled, self.filled + len(features)
        if self.filled > self.rows:
            raise self._miscounted(f"{self.filled} rows, {self.rows} announced")
        dtype = self._features.dtype
        with np.errstate(over="ignore"):
            stored = np.asarray(features).astype(dtype, copy=False)
        if not _finite(stored):
            bad = int((~np.isfinite(stored).all(-1)).sum())
            raise self._not_finite(bad, bool(np.isfinite(features).all()), dtype)
        if len(features):
            rows = slice(start, self.filled)
            self._features[rows], self._coords[rows], self._grid[rows] = stored, coords, grid

    def _not_finite(self, bad: int, overflow: bool, dtype: np.dtype) -> UserError:
        rows = f"{self.name}: {bad} of {self.rows} feature rows"
        if overflow:
            return UserError(f"{rows} exceed the largest {dtype}", "Extract with --dtype float32")
        return UserError(
            f"{rows} are not finite",
            "Check the encoder's checkpoint; nothing was written for this slide",
        )

    def _miscounted(self, what: str) -> UserError:
        return UserError(
            f"{self.name}: {what}", "They must be equal: this is a fault of the extractor"
        )


def size_of(rows: int, width: int, dtype: npt.DTypeLike) -> int:
    """Bytes that a feature file takes, and no more."""
    return rows * (width * np.dtype(dtype).itemsize + 24) + _ROOM


def require_room(folder: Path, size: int) -> None:
    """Raises OSError, ENOSPC, where a folder's disk has not `size` bytes free.

    Said before HDF5 has anything to write: what it cannot, it may take the process down with at its end.
    """
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@contextlib.contextmanager
def feature_file(
    path: str | Path,
    *,
    rows: int,
    width: int,
    dtype: npt.DTypeLike,
    attrs: dict[str, Any],
    names: Sequence[str] = (),
) -> Iterator[FeatureFile]:
    """A file of `rows` features to append to; it is there, whole, when the context ends without an error.

    Args:
        dtype: stored, float16 or float32.
        attrs: `encoder`, `recipe`, `made_from` and `coordinate_attrs`.
        names: of the rows, where they were files: the dataset `name`.

    Raises:
        UserError: see `FeatureFile.append`; or fewer rows came than were announced.
        OSError: ENOSPC or EDQUOT where the disk has no room for it.
    """
    path = Path(path)
    with atomic(path) as temporary, full_disk_told(path):
        require_room(path.parent, size_of(rows, width, dtype))
        with h5py.File(temporary, "w") as file:
            made = FeatureFile(file, path.name, rows, width, dtype)
            about = ("name", "savetodir", "encoder", "recipe", "made_from")
            file["features"].attrs.update({key: attrs[key] for key in about if key in attrs})
            file["coords"].attrs.update({k: v for k, v in attrs.items() if k != "made_from"})
            if names:
                file.create_dataset("name", data=list(names))
            yield made
        if made.filled != rows:
            raise made._miscounted(f"{made.filled} rows, {rows} announced")


def write_features(
    path: str | Path,
    *,
    features: np.ndarray,
    coords: np.ndarray,
    grid: np.ndarray,
    attrs: dict[str, Any],
    kind: np.ndarray | None = None,
    dtype: npt.DTypeLike | None = None,
) -> None:
    """Writes one slide's features at once; `attrs` holds `encoder`, `recipe` and `coordinate_attrs`.

    dtype: stored; None keeps that of `features`.

    Raises:
        UserError: a feature is not finite, or the numbers of rows differ.
    """
    rows, width = features.shape
    dtype = dtype or features.dtype
    with feature_file(path, rows=rows, width=width, dtype=dtype, attrs=attrs) as made:
        made.append(features, coords, grid)
        if kind is not None:
            made.file.create_dataset("kind", data=np.asarray(kind, np.uint8))


def read_features(path: str | Path, *, dtype: npt.DTypeLike | None = np.float32) -> Bag:
    """Reads our files and TRIDENT's or CLAM's.

    Args:
        dtype: of `features`; None keeps the stored one, so that float16 takes half the memory and time.

    Raises:
        UserError: not such a file, or a feature is not finite.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            features, finite = _values(file["features"], dtype)
            coords = np.asarray(file["coords"], np.int64)
            grid = np.asarray(file["grid"], np.int32) if "grid" in file else None
            kind = np.asarray(file["kind"], np.uint8) if "kind" in file else None
            attrs = {**file["features"].attrs, **file["coords"].attrs}
    except (OSError, KeyError) as error:
        raise UserError(
            f"{path}: not a feature file ({error})",
            "Expected HDF5 with `features` (N,D) and `coords` (N,2); delete it and extract again",
        ) from error
    features = features.reshape(-1, features.shape[-1])  # CLAM's (1, N, D) too
    if not finite:
        raise UserError(f"{path}: features hold NaN or infinity", "Extract this slide again")
    kind = np.full(len(features), SPATIAL, np.uint8) if kind is None else kind
    attrs = {k: v.item() if isinstance(v, np.generic) else v for k, v in attrs.items()}
    return Bag(path.stem, features, coords, grid, kind, attrs)


def _values(dataset: Any, dtype: npt.DTypeLike | None) -> tuple[np.ndarray, bool]:
    """All of a dataset of rows as `dtype`, and whether every number is finite.

    Where the rows lie in the file as they are in memory, they are read, looked at and converted in pieces
    that stay in the processor's cache, by several threads. That is so in our files, and mostly in TRIDENT's, whose
    chunks of one row lie one after the other: looking at these one by one takes HDF5 twice the time.
    """
    if not isinstance(dataset, h5py.Dataset):
        raise KeyError(f"{dataset.name} is a group")
    runs = None if dataset.file.userblock_size else _runs(dataset)
    if runs is None:
        values = dataset[()]
        return (values if dtype is None else _cast(values, np.dtype(dtype))), _finite(values)
    values = np.empty(dataset.shape, dataset.dtype if dtype is None else dtype)
    row = dataset.dtype.itemsize * math.prod(dataset.shape[1:])
    size = max(1, PIECE // max(row, 1))
    pieces = [
        (at, min(at + size, end), start + (at - first) * row)
        for first, end, start in runs
        for at in range(first, end, size)
    ]
    with open(dataset.file.filename, "rb") as file:

        def read(piece: tuple[int, int, int]) -> bool:
            first, end, start = piece
            part = values[first:end]
            if part.dtype != dataset.dtype:
                part = np.empty(part.shape, dataset.dtype)
            if os.preadv(file.fileno(), [part.data], start) != part.nbytes:
                raise OSError(f"rows {first} to {end} are cut off")
            finite = _finite(part)
            if part.dtype != values.dtype:
                values[first:end] = _cast(part, values.dtype)
            return finite

        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            return values, all(list(threads.map(read, pieces)))


PIECE = 4 << 20  # bytes; smaller ones cost more in turns than they save


def _runs(dataset: h5py.Dataset) -> list[tuple[int, int, int]] | None:
    """(first row, end, byte in the file) of rows that lie together; None where they must be looked for."""
    if not dataset.size or dataset.dtype.byteorder == ">":
        return None
    if dataset.chunks is None:
        start = dataset.id.get_offset()  # None: nobody has written it, or it lies in another file
        return None if start is None else [(0, len(dataset), start)]
    one_row = dataset.chunks == (1, *dataset.shape[1:])
    if not one_row or dataset.id.get_create_plist().get_nfilters():
        return None
    starts = np.full(len(dataset), -1)

    def note(chunk: Any) -> None:
        starts[chunk.chunk_offset[0]] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    if (starts < 0).any():  # rows that nobody wrote
        return None
    row = dataset.dtype.itemsize * math.prod(dataset.shape[1:])
    breaks = (np.flatnonzero(np.diff(starts) != row) + 1).tolist()
    ends = itertools.pairwise([0, *breaks, len(starts)])
    return [(first, end, int(starts[first])) for first, end in ends]


def _finite(values: np.ndarray) -> bool:
    if (
        values.dtype == np.float16
    ):  # the exponent of NaN and infinity: in the bits, ten times as quick
        positive, negative = values.view(np.int16), values.view(np.uint16)
        return positive.max(initial=0) < 0x7C00 and negative.max(initial=0) < 0xFC00
    with np.errstate(over="ignore", invalid="ignore"):
        # One pass without an array of bools: a sum is finite only if all terms are, but may overflow.
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """(n, d) finite values as another dtype."""
    if (values.dtype, dtype) != (np.float16, np.float32):
        return values.astype(dtype, copy=False)
    # numpy converts float16 value by value. Its exponent and mantissa, moved to float32's place, make the
    # same number but for the exponents' offsets (127 - 15), and that without exception in finite values.
    out = np.empty(values.shape, np.float32)
    for start in range(0, len(values), _ROWS):  # few enough to stay in the processor's cache
        part = out[start : start + _ROWS]
        bits = part.view(np.int32)
        bits[...] = values[start : start + _ROWS].view(np.int16)
        bits <<= 13
        bits &= _SIGN_EXPONENT_MANTISSA
        part *= np.float32(2.0**112)
    return out


def identity_of(path: str | Path) -> str | None:
    """A feature file's recipe; a foreign file has none, and is known by its size and time. None if absent."""
    recipe = recipe_of(path)
    if recipe == "":
        stat = Path(path).stat()
        return f"{stat.st_size} bytes, {stat.st_mtime_ns}"
    return recipe


def recipe_of(path: str | Path) -> str | None:
    """The recipe hash a feature file was made under, or None if it is absent or unreadable."""
    try:
        with h5py.File(path, "r") as file:
            return str(file["features"].attrs.get("recipe", ""))
    except (OSError, KeyError):
        return None
