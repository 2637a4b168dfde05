"""Which slides to tile: a folder, or a CSV that names them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pathme_jax.errors import UserError
from pathme_jax.files import read_csv

# DICOM is left out: one slide is many .dcm files. Name one of them in a CSV.
EXTENSIONS = {
    f".{name}" for name in "svs tif tiff ndpi mrxs scn vms vmu bif svslide".split()
}  # fmt: skip
EDGE_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class SlideFile:
    """A slide on disk.

    Attributes:
        slide_id: file stem.
        path: the file.
        mpp: µm per level-0 pixel given by the user, or None to ask the file.
    """

    slide_id: str
    path: Path
    mpp: float | None


def find_slides(source: str | Path, mpp_csv: str | Path | None = None) -> list[SlideFile]:
    """Slides of a folder or CSV, by slide_id.

    Args:
        source: folder of whole-slide files, or CSV with a column `wsi`, `slide` or `path` (relative to
            the CSV) and perhaps `mpp`.
        mpp_csv: CSV with columns `wsi` or `slide_id`, and `mpp`; goes before `source`'s `mpp`.

    Raises:
        UserError: nothing there, a column missing, two files with one stem, an mpp that is no number.
    """
    source = Path(source)
    overrides = _read_mpp_csv(Path(mpp_csv)) if mpp_csv else {}
    if source.is_dir():
        files = [(p, None) for p in source.iterdir() if p.suffix.lower() in EXTENSIONS]
        if not files:
            raise UserError(
                f"{source}: no whole-slide file directly in it",
                f"Expected one of {' '.join(sorted(EXTENSIONS))}; slides elsewhere: list them in a CSV",
            )
    elif source.is_file():
        files = list(_read_list(source))
    else:
        raise UserError(
            f"{source}: no such folder or CSV", "Give --slides a folder or a CSV of slides"
        )
    slides: dict[str, SlideFile] = {}
    for path, mpp in sorted(files, key=lambda file: (file[0].stem, str(file[0]))):
        if path.stem in slides:
            raise UserError(
                f"{path} and {slides[path.stem].path} would both be slide {path.stem}",
                "Rename one: a slide is known by its file name without the extension",
            )
        slides[path.stem] = SlideFile(path.stem, path, overrides.get(path.stem, mpp))
    return list(slides.values())


def _read_list(path: Path) -> Iterable[tuple[Path, float | None]]:
    rows = read_csv(path)
    column = _column(path, rows, ("wsi", "slide", "path"))
    for row in rows:
        yield path.parent / row[column], _mpp(path, row[column], row.get("mpp"))


def _read_mpp_csv(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise UserError(f"{path}: no such file", "Give --mpp-csv a CSV with columns wsi,mpp")
    rows = read_csv(path)
    column = _column(path, rows, ("wsi", "slide_id"))
    _column(path, rows, ("mpp",))
    found = {}
    for row in rows:
        # `wsi` ends in an extension, and a slide_id may hold dots of its own
        name = Path(row[column])
        slide_id = name.stem if name.suffix.lower() in EXTENSIONS | {".dcm"} else name.name
        mpp = _mpp(path, row[column], row["mpp"])
        if mpp is not None:
            found[slide_id] = mpp
    return found


def _column(path: Path, rows: list[dict[str, str]], names: tuple[str, ...]) -> str:
    present = list(rows[0]) if rows else []
    for name in names:
        if name in present:
            return name
    raise UserError(
        f"{path}: no column {' or '.join(names)} (found {', '.join(present) or 'no rows'})",
        "Name it in the CSV's first line",
    )


def _mpp(path: Path, slide: str, text: str | None) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        mpp = float(text)
    except ValueError:
        mpp = math.nan
    if not 0.05 <= mpp <= 20:
        raise UserError(
            f"{path}: mpp of {slide} is {text!r}, expected µm per pixel from 0.05 to 20",
            "Correct it; 0.25 is a 40x scan, 0.5 a 20x scan",
        )
    return mpp


def fingerprint(path: Path) -> dict[str, Any]:
    """Tells a replaced file from the one that was tiled, without reading all of it.

    Raises:
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    edges = hashlib.sha256()
    with open(path, "rb") as file:
        edges.update(file.read(EDGE_BYTES))
        file.seek(max(0, size - EDGE_BYTES))
        edges.update(file.read(EDGE_BYTES))
    return {"size": size, "edges": edges.hexdigest()[:16]}
