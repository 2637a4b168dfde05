"""The region index and its feature columns: what PatHME trains on.

    <grid>/regions-<hash8>/
        recipe.json                  columns, widths, means and deviations, where each came from
        index.npz                    slide_id, grid, …: one row a region; valid/<column>: (r, s, s) bool
        <column>.array_record        record i: region i's (s, s, d) float16 features, zero where not valid

A column is named `<encoder>@<magnification>x`; s is 16, 4 or 1 tiles a region side. Which cells are
tissue is in the index, so a zero is never mistaken for a feature.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
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


def write_regions(
    folder: Path, *, index: Index, columns: Mapping[str, np.ndarray], recipe: Mapping[str, Any]
) -> None:
    """Writes the whole folder, renamed into place when complete.

    columns: name to (r, s, s, d); cells that are not valid are stored as zeros.
    """
    described = []
    with atomic(folder) as temporary:
        temporary.mkdir()
        for name, values in columns.items():
            seen = index.valid[name]
            values = np.where(seen[..., None], values, 0).astype(np.float16)
            writer = ArrayRecordWriter(str(temporary / f"{name}.array_record"), "group_size:1")
            for value in values:
                writer.write(value.tobytes())
            writer.close()
            tissue = values[seen].astype(np.float64)
            tissue = tissue if len(tissue) else np.zeros((1, values.shape[-1]))
            described.append(
                {
                    "name": name,
                    "side": values.shape[1],
                    "width": values.shape[-1],
                    "mean": np.round(tissue.mean(0), 6).tolist(),
                    "std": np.round(tissue.std(0), 6).tolist(),
                }
            )
        arrays: dict[str, Any] = {k: getattr(index, k) for k in PLAIN}
        arrays |= {f"valid/{name}": mask for name, mask in index.valid.items()}
        np.savez(temporary / "index.npz", **arrays)
        write_json(temporary / "recipe.json", {**recipe, "columns": described})


class RegionSource:
    """Random access to regions, for Grain: item i is {alias: (s, s, d), alias_valid: (s, s)}.

    Args:
        folder: what `data_prep.regions` wrote.
        columns: alias to column name; experts are standardised when their alias starts with "experts/".
    """

    def __init__(self, folder: str | Path, columns: Mapping[str, str]):
        self.folder = Path(folder)
        if not (self.folder / "index.npz").exists():
            raise UserError(
                f"{self.folder}: no regions here", "Make them with `python -m data_prep.regions`"
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
        return f"RegionSource({len(self)} regions, {digest(self.recipe)})"

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
