"""The region index and its feature columns: what PatHME trains on.

    <grid>/regions-<hash8>/
        recipe.json                  columns, widths, means and deviations, where each came from;
                                     made_from: column name to the encoders behind it, with licences
        index.npz                    slide_id, grid, …: one row a region; valid/<column>: (r, s, s) bool
        <column>.array_record        record i: region i's (s, s, d) float16 features, zero where not valid

A column is named `<encoder>@<magnification>x`; s is 16, 4 or 1 tiles a region side. Which cells are
tissue is in the index, so a zero is never mistaken for a feature.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, read_json, write_json

PLAIN = ("slide_id", "grid", "slide_mpp", "level0_size")  # arrays of the index with one name each
SIDE = {1: 16, 4: 4, 16: 1}  # tiles along a region's side, by mpp over the finest mpp


@dataclasses.dataclass(frozen=True)
class Column:
    """One encoder at one magnification.

    Attributes:
        side: tiles along a region's side. width: features a tile.
        mean, std: (width,) over valid cells, for standardising an expert.
    """

    name: str
    side: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Index:
    """One row a region, in (slide_id, row, column) order.

    Attributes:
        slide_id: (r,) str. grid: (r, 2) row, column of its first field.
        slide_mpp: (r,). level0_size: (r, 2) width, height of the slide.
        valid: column name to (r, s, s) bool.
    """

    slide_id: np.ndarray
    grid: np.ndarray
    slide_mpp: np.ndarray
    level0_size: np.ndarray
    valid: Mapping[str, np.ndarray]


class _Moments:
    """Mean and deviation of rows that come some at a time.

    Deviations are joined by Chan's update: a sum of squares would lose those of features far from zero.
    """

    def __init__(self, width: int):
        self.count, self.total, self.squares = 0, np.zeros(width), np.zeros(width)

    def add(self, rows: np.ndarray) -> None:
        """rows: (n, width) float64."""
        if not len(rows):
            return
        count, total = len(rows), rows.sum(0)
        self.squares += ((rows - total / count) ** 2).sum(0)
        if self.count:
            apart = total / count - self.mean
            self.squares += apart**2 * (self.count * count / (self.count + count))
        self.count, self.total = self.count + count, self.total + total

    @property
    def mean(self) -> np.ndarray:
        return self.total / max(self.count, 1)

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.squares / max(self.count, 1))


class RegionWriter:
    """A folder of regions while they come in, one by one: of their features no more is in memory.

    Attributes:
        widths: column name to features a tile, once a region is there.
    """

    def __init__(self, folder: Path, names: Iterable[str], files: contextlib.ExitStack):
        self._folder = folder
        self._rows: list[tuple[Any, ...]] = []  # PLAIN of each region
        self._valid: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self._moments: dict[str, _Moments] = {}
        self._records = {}
        for name in self._valid:
            writer = ArrayRecordWriter(str(folder / f"{name}.array_record"), "group_size:1")
            files.callback(writer.close)
            self._records[name] = writer

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def widths(self) -> dict[str, int]:
        return {name: len(moments.total) for name, moments in self._moments.items()}

    def append(
        self,
        *,
        slide_id: str,
        grid: Sequence[int] | np.ndarray,
        slide_mpp: float,
        level0_size: Sequence[int],
        columns: Mapping[str, tuple[np.ndarray, np.ndarray]],
    ) -> None:
        """The next region.

        Args:
            slide_id, grid, slide_mpp, level0_size: see `Index`.
            columns: name to (s, s, d) values and (s, s) valid; others than these are stored as zeros.
        """
        for name, (values, valid) in columns.items():
            stored = np.where(valid[..., None], values, 0).astype(np.float16)
            self._records[name].write(stored.tobytes())
            moments = self._moments.setdefault(name, _Moments(stored.shape[-1]))
            moments.add(stored[valid].astype(np.float64))
            self._valid[name].append(valid)
        self._rows.append((slide_id, grid, slide_mpp, level0_size))

    def finish(self, recipe: Mapping[str, Any]) -> None:
        """Writes the index, and the recipe with the columns' description. At least one region is there."""
        plain = zip(PLAIN, zip(*self._rows, strict=True), strict=True)
        arrays: dict[str, Any] = {key: np.array(values) for key, values in plain}
        arrays["grid"] = arrays["grid"].astype(np.int32)
        arrays |= {f"valid/{name}": np.stack(masks) for name, masks in self._valid.items()}
        np.savez(self._folder / "index.npz", **arrays)
        described = [
            {
                "name": name,
                "side": masks[0].shape[0],
                "width": self.widths[name],
                "mean": np.round(self._moments[name].mean, 6).tolist(),
                "std": np.round(self._moments[name].std, 6).tolist(),
            }
            for name, masks in self._valid.items()
        ]
        write_json(self._folder / "recipe.json", {**recipe, "columns": described})


@contextlib.contextmanager
def region_writer(folder: Path, names: Iterable[str]) -> Iterator[RegionWriter]:
    """A folder of columns `names`, renamed into place when the context ends without an error.

    Append every region to what it yields, then `finish` that.
    """
    with atomic(folder) as temporary, contextlib.ExitStack() as files:
        temporary.mkdir()
        yield RegionWriter(temporary, names, files)


def complete(folder: Path) -> bool:
    """Whether `folder` holds regions."""
    return all((folder / name).exists() for name in ("recipe.json", "index.npz"))


class RegionSource:
    """Random access to regions, for Grain: item i is {alias: (s, s, d), alias_valid: (s, s)}.

    Args:
        folder: what `data_prep.regions` wrote.
        columns: alias to column name; experts are standardised when their alias starts with "experts/".

    Raises:
        UserError: no regions there, or not that column.
    """

    def __init__(self, folder: str | Path, columns: Mapping[str, str]):
        self.folder = Path(folder)
        if not complete(self.folder):
            raise UserError(
                f"{self.folder}: no regions here (expected recipe.json and index.npz)",
                "Give the folder that `python -m data_prep.regions` printed, or run it again",
            )
        self.recipe = read_json(self.folder / "recipe.json")
        known = {c["name"]: Column(**c) for c in self.recipe["columns"]}
        for alias, name in columns.items():
            if name not in known:
                raise UserError(
                    f"{self.folder}: no column {name!r} (asked for as {alias!r}); it has {sorted(known)}",
                    "Extract with that encoder and run `python -m data_prep.regions` again",
                )
        self.columns = {alias: known[name] for alias, name in columns.items()}

    @functools.cached_property
    def index(self) -> Index:
        with np.load(self.folder / "index.npz") as file:
            plain = {k: file[k] for k in PLAIN}
            valid = {
                k.removeprefix("valid/"): file[k] for k in file.files if k.startswith("valid/")
            }
        return Index(**plain, valid=valid)

    @functools.cached_property
    def _readers(self) -> dict[str, Any]:
        return {
            alias: ArrayRecordReader(str(self.folder / f"{column.name}.array_record"))
            for alias, column in self.columns.items()
        }

    def __getstate__(self) -> dict[str, Any]:  # Grain's workers open their own readers
        return {k: v for k, v in self.__dict__.items() if k != "_readers"}

    def __repr__(self) -> str:  # Grain compares it when it resumes; it is also the data's identity
        data = {key: value for key, value in self.recipe.items() if key != "made_from"}
        return f"RegionSource({len(self)} regions, {digest(data)})"

    def __len__(self) -> int:
        return len(self.index.slide_id)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        item = {}
        for alias, column in self.columns.items():
            try:
                data = self._readers[alias].read([int(index)])[0]
            except (RuntimeError, IndexError) as error:
                raise UserError(
                    f"{self.folder}/{column.name}.array_record: record {index} cannot be read ({error})",
                    "Delete this folder and run data_prep.regions again with the same arguments",
                ) from error
            shape = (column.side, column.side, column.width)
            values = np.frombuffer(data, np.float16).reshape(shape).astype(np.float32)
            valid = self.index.valid[column.name][index]
            if alias.startswith("experts/"):
                std = np.asarray(column.std, np.float32)
                values = (values - np.asarray(column.mean, np.float32)) / np.maximum(std, 1e-6)
                values = np.where(valid[..., None], values, 0)
            item[alias], item[f"{alias}_valid"] = values, valid
        return item
