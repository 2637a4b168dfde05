"""Feature files: one HDF5 per slide, in TRIDENT's layout, so that TRIDENT, CLAM and torchmil read them.

    <grid>/{mag:g}x_{px}px_{overlap}px_overlap/patches/<slide>_patches.h5        coords
    <grid>/{mag:g}x_{px}px_{overlap}px_overlap/features_<encoder>/<slide>.h5     features, coords, grid[, kind]

Datasets are contiguous: TRIDENT's own (1, D) chunks read five to ten times slower.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.files import atomic

SPATIAL, PROMPT = 0, 1  # values of `kind`


@dataclasses.dataclass
class Bag:
    """One slide's instances.

    Attributes:
        slide_id: file stem.
        features: (m, d) float32.
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


def folder_name(mpp: float, px: int = 256, overlap: int = 0) -> str:
    """TRIDENT's folder for tiles of `px` pixels at `mpp`: 20x_256px_0px_overlap."""
    return f"{magnification(mpp):g}x_{px}px_{overlap}px_overlap"


def write_coords(path: str | Path, coords: np.ndarray, attrs: dict[str, Any]) -> None:
    """Writes `patches/<slide>_patches.h5`. `attrs`: TRIDENT's, see `coordinate_attrs`."""
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
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


def write_features(
    path: str | Path,
    *,
    features: np.ndarray,
    coords: np.ndarray,
    grid: np.ndarray,
    attrs: dict[str, Any],
    kind: np.ndarray | None = None,
) -> None:
    """Writes one slide's features; `attrs` holds `encoder`, `recipe` and `coordinate_attrs`.

    Raises:
        UserError: a feature is not finite, or the numbers of rows differ.
    """
    path = Path(path)
    if not len(features) == len(coords) == len(grid):
        raise UserError(
            f"{path.name}: {len(features)} features, {len(coords)} coordinates, {len(grid)} cells",
            "They must be equal: this is a fault of the extractor",
        )
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features).all(-1)).sum())
        raise UserError(
            f"{path.name}: {bad} of {len(features)} feature rows are not finite",
            "Check the encoder's checkpoint; nothing was written for this slide",
        )
    with atomic(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("features", data=features).attrs.update(
            {key: attrs[key] for key in ("name", "savetodir", "encoder", "recipe") if key in attrs}
        )
        file.create_dataset("coords", data=np.asarray(coords, np.int64)).attrs.update(attrs)
        file.create_dataset("grid", data=np.asarray(grid, np.int32))
        if kind is not None:
            file.create_dataset("kind", data=np.asarray(kind, np.uint8))


def read_features(path: str | Path) -> Bag:
    """Reads our files and TRIDENT's or CLAM's.

    Raises:
        UserError: not such a file, or a feature is not finite.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            features = np.asarray(file["features"], np.float32)
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
    if not np.isfinite(features).all():
        raise UserError(f"{path}: features hold NaN or infinity", "Extract this slide again")
    kind = np.full(len(features), SPATIAL, np.uint8) if kind is None else kind
    attrs = {k: v.item() if isinstance(v, np.generic) else v for k, v in attrs.items()}
    return Bag(path.stem, features, coords, grid, kind, attrs)


def recipe_of(path: str | Path) -> str | None:
    """The recipe hash a feature file was made under, or None if it is absent or unreadable."""
    try:
        with h5py.File(path, "r") as file:
            return str(file["features"].attrs.get("recipe", ""))
    except (OSError, KeyError):
        return None
