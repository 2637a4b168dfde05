"""What comes back from the encoders, written slide by slide; of each slide, all or nothing.

<grid>/…/features_<encoder>/<slide>.h5     see `records.features`
<grid>/extraction/<slide>.json             what came of it: times, tiles, reason and cure
<grid>/extraction.csv                      those of the last run's slides as a table
<grid>/extraction_errors.csv               the ones that failed
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.data.stores import Failure, failure
from pathme_jax.data.tiles import Task
from pathme_jax.encoders.devices import Part
from pathme_jax.errors import UserError
from pathme_jax.files import listed, read_json, temporary, write_csv, write_json
from pathme_jax.records import features as feature_files
from pathme_jax.records.claims import Claims
from pathme_jax.slides.tile import raise_if_full

COLUMNS = ["slide_id", "state", "tiles", "tiles_at", "seconds", "tiles_per_second", "encoders"]
COLUMNS += ["reason", "cure", "stored"]
ERROR_COLUMNS = ["slide_id", "reason", "cure"]
HELD: Failure = {"reason": "another process has it"}


class Grid:
    """Where features of one grid go, and in which form.

    Attributes:
        root: the grid's folder. mpp: the finest µm/px. tile_px: side of a tile. dtype: stored.
        folders: (encoder, multiple of mpp) to the folder of its files.
        lineage: encoder to what its features are made from, see `Encoder.lineage`.
    """

    def __init__(
        self,
        root: Path,
        mpp: float,
        tile_px: int,
        dtype: str,
        lineage: Mapping[str, Sequence[Mapping[str, Any]]],
        multiples: Sequence[int],
    ):
        self.root, self.mpp, self.tile_px, self.dtype = root, mpp, tile_px, dtype
        self.lineage = lineage
        self.folders = {
            (name, k): root / feature_files.folder_name(mpp * k, tile_px) / f"features_{name}"
            for name in lineage
            for k in multiples
        }
        self._columns = {folder: column for column, folder in self.folders.items()}

    def column(self, file: Path) -> tuple[str, int]:
        """Encoder and multiple of a slide's file."""
        return self._columns[file.parent]

    def cell_um(self, multiple: int) -> float:
        """A region view's cell is that of its first field."""
        return self.tile_px * self.mpp * min(multiple, 4)


class SlideFiles:
    """The files of one slide while its features come in."""

    def __init__(self, task: Task, grid: Grid, widths: Mapping[str, int]):
        self.task, self.grid = task, grid
        self._files: dict[tuple[str, int], feature_files.FeatureFile] = {}
        missing = [(path, *grid.column(path)) for path in task.missing()]
        shapes = [(task.slide.count(multiple), widths[name]) for _, name, multiple in missing]
        size = sum(feature_files.size_of(*shape, grid.dtype) for shape in shapes)
        # For all at once: none takes its room before it is filled.
        feature_files.require_room(grid.root, size)
        with contextlib.ExitStack() as stack:
            for (path, name, multiple), (rows, width) in zip(missing, shapes, strict=True):
                made = feature_files.feature_file(
                    path,
                    rows=rows,
                    width=width,
                    dtype=grid.dtype,
                    attrs=self._attrs(name, multiple, task.files[path]),
                    names=task.slide.names,
                )
                self._files[name, multiple] = stack.enter_context(made)
            self._stack = stack.pop_all()

    def _attrs(self, encoder: str, multiple: int, recipe: str) -> dict[str, Any]:
        slide = self.task.slide
        about = feature_files.coordinate_attrs(
            slide_id=slide.slide_id,
            mpp=self.grid.mpp * multiple,
            slide_mpp=slide.slide_mpp,
            level0_size=slide.level0_size,
            px=self.grid.tile_px,
        )
        made_from = json.dumps(self.grid.lineage[encoder])
        return {**about, "encoder": encoder, "recipe": recipe, "made_from": made_from}

    def append(self, parts: Sequence[Part], outputs: Mapping[str, np.ndarray]) -> None:
        """The next rows. Raises UserError where a feature cannot be stored, and see `_unwritten`."""
        rows = np.concatenate([np.arange(part.rows.start, part.rows.stop) for part in parts])
        multiples = np.concatenate([part.multiple for part in parts])
        cells = np.concatenate([part.grid for part in parts])
        for (name, multiple), file in self._files.items():
            mine = multiples == multiple
            if mine.any():
                level0 = feature_files.level0(
                    cells[mine], self.grid.cell_um(multiple), self.task.slide.slide_mpp
                )
                file.append(outputs[name][rows[mine]], level0, cells[mine])

    def finish(self, seconds: float) -> dict[str, Any]:
        """Renames the files into place; the slide's row. Raises UserError where rows are missing."""
        self._stack.close()
        slide = self.task.slide
        at = {self.grid.mpp * k: slide.count(k) for k in self.task.multiples}
        return {
            "state": "done",
            "tiles": sum(at.values()),
            "tiles_at": " ".join(f"{mpp:g}:{count}" for mpp, count in at.items()),
            "seconds": round(seconds, 2),
            "tiles_per_second": round(sum(at.values()) / max(seconds, 1e-9), 1),
            "encoders": ",".join(sorted({name for name, _ in self._files})),
        }

    def discard(self, error: Exception) -> None:
        with contextlib.suppress(OSError, RuntimeError):  # HDF5, of what it could not write
            self._stack.__exit__(type(error), error, None)


class Arrivals:
    """Takes batches of features in order and writes each slide when its last has come.

    Attributes:
        done: ids of slides written. failures: of slides that failed. left: tasks that another process
            has, or had before this one could.
    """

    def __init__(
        self, tasks: Sequence[Task], grid: Grid, widths: Mapping[str, int], claims: Claims
    ):
        self.tasks, self.grid, self.widths, self.claims = tasks, grid, widths, claims
        self.done: list[str] = []
        self.failures: list[Failure] = []
        self.left: list[Task] = []
        self._open: SlideFiles | None = None
        self._problem: Failure | None = None  # of the slide that is coming in
        self._ended = 0
        self._since = (
            time.perf_counter()
        )  # when the slide before had come: slides come one after another

    def receive(self, parts: Sequence[Part], outputs: Mapping[str, np.ndarray]) -> int:
        """Writes a batch's features; how many tiles were written. Raises OSError where the disk is full."""
        groups = itertools.groupby(parts, lambda part: part.task)
        return sum(self._receive(self.tasks[at], list(group), outputs) for at, group in groups)

    def _receive(self, task: Task, parts: list[Part], outputs: Mapping[str, np.ndarray]) -> int:
        stops = (HELD if part.held else part.failed for part in parts)
        problem = self._problem or next(filter(None, stops), None)
        written = 0
        if problem is None:
            try:
                if self._open is None:
                    self._clear(task)
                    self._open = SlideFiles(task, self.grid, self.widths)
                self._open.append(parts, outputs)
                written = sum(len(part.multiple) for part in parts)
                if parts[-1].last:
                    self._tell(task, self._open.finish(time.perf_counter() - self._since))
                    self.done.append(task.slide.slide_id)
            except UserError as error:
                problem = failure(task.slide.slide_id, error)
            except (OSError, RuntimeError) as error:  # the latter is HDF5's, of closing
                problem = failure(task.slide.slide_id, _unwritten(error))
        if problem:
            self.discard()
        self._problem = problem
        if parts[-1].last:
            self._end(task)
        return written

    def _end(self, task: Task) -> None:
        problem, self._open, self._problem = self._problem, None, None
        if problem is HELD:
            self.left.append(task)
        elif problem:
            self.failures.append(problem)
            self._tell_failure(task, problem)
        self.claims.release(task.slide.slide_id)
        self._ended += 1
        self._since = time.perf_counter()

    def lose(self, slide_ids: Sequence[str], failure_of: Callable[[str], Failure]) -> None:
        """After a worker's death: these slides failed, what else had not come in is left to be done."""
        self.discard()
        unfinished = self.tasks[self._ended :]
        for task in unfinished:
            if task.slide.slide_id in slide_ids:
                self._problem = failure_of(task.slide.slide_id)
                self._end(task)
            else:
                self.left.append(task)
        if len(self.left) == len(unfinished):
            raise UserError("a reading process died, over no slide", "Try fewer --workers")

    def discard(self) -> None:
        """Removes what was written of a slide that is not complete."""
        if self._open:
            self._open.discard(UserError("not complete", "Extract it again"))
        self._open = None

    def _clear(self, task: Task) -> None:
        """Removes what processes that died over this slide had begun, on this host or another."""
        for owner in self.claims.owners(task.slide.slide_id)[:-1]:
            for path in task.files:
                temporary(path, owner).unlink(missing_ok=True)

    def _tell(self, task: Task, row: Mapping[str, Any]) -> None:
        slide_id = task.slide.slide_id
        tell(self.grid.root, {"slide_id": slide_id, **row})

    def _tell_failure(self, task: Task, problem: Failure) -> None:
        encoders = ",".join(sorted({self.grid.column(path)[0] for path in task.files}))
        try:
            self._tell(task, {"state": "failed", "encoders": encoders, **problem})
        except OSError as error:  # `failures` has it
            raise_if_full(error)


def _unwritten(error: OSError | RuntimeError) -> UserError:
    """Of one slide; a full disk, on which none can be written, is raised."""
    raise_if_full(error)
    return UserError(
        f"its features cannot be written ({error})",
        "Check the disk, and that the folder may be written; then extract again",
    )


def tell(root: Path, row: Mapping[str, Any]) -> None:
    """Keeps what came of a slide."""
    write_json(root / "extraction" / f"{row['slide_id']}.json", row)


def write_tables(root: Path, slide_ids: Sequence[str]) -> None:
    """Both tables anew, of this run's slides: whichever of several processes is last has all.

    A row is about the last run that had work on its slide, and about the `encoders` it names; `stored`
    names all that have features of the slide, those of earlier runs too.
    """
    stored = _stored(root)
    rows = []
    for slide_id in sorted(slide_ids):
        with contextlib.suppress(OSError, ValueError):  # none was kept, or it is damaged
            row = read_json(root / "extraction" / f"{slide_id}.json")
            rows.append({**row, "stored": ",".join(sorted(stored[slide_id]))})
    write_csv(root / "extraction.csv", rows, COLUMNS)
    failed = [row for row in rows if row["state"] == "failed"]
    write_csv(root / "extraction_errors.csv", failed, ERROR_COLUMNS)


def _stored(root: Path) -> Mapping[str, set[str]]:
    """Each slide's encoders that have a file of it, at any µm/px."""
    found = collections.defaultdict(set)
    for folder in root.glob("*/features_*"):
        for path in listed(folder, ".h5"):
            found[path.stem].add(folder.name.removeprefix("features_"))
    return found
