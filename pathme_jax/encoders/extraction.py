"""Features of every slide with several encoders at once, in TRIDENT's layout.

Every tile is read once and goes through every encoder. Batches have one static shape and cross slides and
magnifications; a row's features do not depend on its neighbours, so the order in which slides are done,
by how many processes, and where a killed run took up again change no file.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pathme_jax.data.stores import Failure, FieldStore, SlideStore, Store, failure
from pathme_jax.data.tiles import Lost, Task, Tiles, stream
from pathme_jax.encoders.arrivals import Arrivals, Grid, tell, write_tables
from pathme_jax.encoders.devices import Devices, Speed
from pathme_jax.encoders.encoder import Encoder, load
from pathme_jax.errors import UserError
from pathme_jax.files import digest
from pathme_jax.records import features as feature_files
from pathme_jax.records.claims import Claims
from pathme_jax.slides.tile import CRASHED

VERSION = 2  # of what is computed here; part of every recipe
DTYPES, PRECISIONS = ("float16", "float32"), ("float32", "bfloat16")
MPPS = (0.5, 2.0, 8.0)  # µm/px that slides are read at by default: 20x, 5x, 1.25x
ROW_BYTES = 24  # of coordinates and cell
EncoderLike = str | Path | Encoder
POLL = 2.0  # seconds between looks at what other processes still have


@dataclasses.dataclass(frozen=True)
class Extracted:
    """What an extraction left.

    Attributes:
        folders: (encoder name, mpp) to the folder of that encoder's HDF5 files.
        errors: {"slide_id", "reason", "cure"} of slides that failed.
        done, skipped: slides encoded now, and found done or done by another process meanwhile.
        speed: of the encoding, without what came before: tissue, compilation.
    """

    folders: dict[tuple[str, float], Path]
    errors: list[Failure]
    done: int
    skipped: int
    speed: Speed = dataclasses.field(default_factory=Speed)

    def __str__(self) -> str:
        lines = [str(path) for path in self.folders.values()]
        lines += [str(self.speed)] if self.speed.tiles else []
        lines.append(
            f"{self.done} slides encoded, {self.skipped} were done, {len(self.errors)} failed"
        )
        lines += [f"  {e['slide_id']}: {e['reason']}. {e['cure']}" for e in self.errors]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tiles are encoded and stored; `choose` makes them.

    Attributes:
        mpps: µm/px; None for all that the source can serve.
        dtype: stored, "float16" or "float32".
        precision: of the computation, "float32" or "bfloat16".
        batch: tiles at once.
        workers: processes that read; 0 for threads of this one.
        planners: processes that find tissue, before.
    """

    mpps: Sequence[float] | None
    dtype: str
    precision: str
    batch: int
    workers: int
    planners: int


def choose(
    *,
    mpps: Sequence[float] | None = None,
    dtype: str = "float16",
    precision: str | None = None,
    batch: int | None = None,
    workers: int | None = None,
) -> Settings:
    """Settings, what is None chosen for this machine: on a CPU float32, 32 tiles and no further process;
    else bfloat16, 256 tiles a device and a process a core.

    Raises:
        UserError: a wrong value.
    """
    cpu = jax.default_backend() == "cpu"
    planners = cores() if workers is None else workers
    if precision is None:
        precision = precision_here()
    if batch is None:
        batch = 32 if cpu else 256 * jax.local_device_count()
    if workers is None:
        workers = 0 if cpu else cores()
    for name, value, good, expected in (
        ("dtype", dtype, dtype in DTYPES, " or ".join(DTYPES)),
        ("precision", precision, precision in PRECISIONS, " or ".join(PRECISIONS)),
        ("batch", batch, batch >= 1, "1 or more tiles"),
        ("workers", workers, workers >= 0, "0 or more processes"),
    ):
        if not good:
            raise UserError(f"--{name} {value}: expected {expected}", "Correct it")
    return Settings(mpps, dtype, precision, batch, workers, planners)


def precision_here() -> str:
    """bfloat16 where the device multiplies it faster than float32."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def cores() -> int:
    return min(16, os.cpu_count() or 1)


def parse_mpps(text: str) -> list[float]:
    """µm/px of a list such as 0.5,2,8."""
    try:
        mpps = sorted({float(part) for part in text.split(",")})
    except ValueError:
        mpps = []
    if not mpps or mpps[0] <= 0:
        raise UserError(f"--mpp {text!r}", "Give µm/px such as 0.5 or 0.5,2,8")
    return mpps


def multiples_of(mpps: Iterable[float], base: float, served: Sequence[int]) -> list[int]:
    """The µm/px as multiples of the finest. Raises UserError on one that is not served."""
    ladder = {multiple: base * multiple for multiple in served}
    found = set()
    for mpp in mpps:
        near = [k for k, at in ladder.items() if abs(mpp / at - 1) < 1e-6]
        if not near:
            offered = ", ".join(f"{at:g}" for at in ladder.values())
            raise UserError(
                f"--mpp {mpp:g} cannot be had here: fields at {base:g} µm/px give {offered}",
                "Choose among them, or run once more with another finest µm/px",
            )
        found.add(near[0])
    return sorted(found)


# ---- the sources -----------------------------------------------------------------------------------


def extract_fields(
    grid_dir: str | Path,
    encoders: Sequence[EncoderLike],
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Extracted:
    """Features of the tiles that `data_prep.tile` stored.

    At the fields' own mpp the tiles are the tissue children of each field; at 4 x, the whole field,
    area-averaged; at 16 x, the stored region views.

    Args:
        grid_dir: what `data_prep.tile` wrote. out: where features go, default beside the fields.
        encoders: fixed encoders' names, or folders, see `encoders.load`; or an `Encoder`, as precise as it is.
        settings: of `choose`.
    """
    return extract(FieldStore(grid_dir), encoders, out=out, progress=progress, **settings)


def extract_slides(
    slides: str | Path,
    out: str | Path,
    encoders: Sequence[EncoderLike],
    *,
    mpps: Sequence[float] = MPPS,
    tile_px: int = 256,
    progress: bool = True,
    mpp_csv: str | Path | None = None,
    tissue_dir: str | Path | None = None,
    **settings: Any,
) -> Extracted:
    """Features straight from slides: those that `data_prep.tile` and `extract_fields` would give, with
    thumbnails, outlines and coordinates in the same places, and no pixels stored.

    Args:
        slides, out, mpp_csv, tissue_dir: see `slides.tile.run`.
        mpps: the finest, and 4 or 16 times it. tile_px: side of a tile.
        encoders, settings: see `extract_fields`.
    """
    store = slide_store(slides, out, mpps, tile_px, mpp_csv, tissue_dir)
    return extract(store, encoders, mpps=mpps, progress=progress, **settings)


def slide_store(
    slides: str | Path,
    out: str | Path,
    mpps: Sequence[float],
    tile_px: int = 256,
    mpp_csv: str | Path | None = None,
    tissue_dir: str | Path | None = None,
) -> SlideStore:
    """The slides, in tiles whose finest µm/px is the smallest of `mpps`."""
    return SlideStore(
        slides,
        out,
        mpp_csv=mpp_csv,
        tissue_dir=tissue_dir,
        mpp=min(mpps),
        tile_px=tile_px,
        field_px=4 * tile_px,
    )


# ---- the run ---------------------------------------------------------------------------------------


class Run:
    """Encoders, and what they are to write where."""

    def __init__(
        self,
        store: Store,
        encoders: Sequence[EncoderLike],
        out: str | Path | None,
        settings: Settings,
    ):
        self.store, self.settings = store, settings
        self.models = {model.name: model for model in map(self._load, encoders)}
        mpps = settings.mpps or [store.mpp * k for k in store.multiples]
        self.multiples = multiples_of(mpps, store.mpp, store.multiples)
        root = Path(out) / store.grid_dir.name if out else store.grid_dir
        self.grid = Grid(
            root,
            store.mpp,
            store.tile_px,
            settings.dtype,
            {name: model.lineage for name, model in self.models.items()},
            self.multiples,
        )

    def _load(self, given: EncoderLike) -> Encoder:
        model = given if isinstance(given, Encoder) else load(given, self.settings.precision)
        if model.record != "fields":
            raise UserError(f"{model.name} encodes regions, not images", "Extract with --regions")
        return model

    def missing(self, slide_id: str, pixels: Any) -> dict[Path, str]:
        """The slide's files that are not there under their recipe, and those recipes."""
        found = {}
        for (name, multiple), folder in self.grid.folders.items():
            path = folder / f"{slide_id}.h5"
            recipe = self._recipe(name, multiple, pixels)
            if feature_files.recipe_of(path) != recipe:
                found[path] = recipe
        return found

    def _recipe(self, encoder: str, multiple: int, pixels: Any) -> str:
        """Of one slide's features: its pixels, what encoded them, and how."""
        computed = self.models[encoder].dtype
        made_by = [encoder, self.store.mpp * multiple, self.settings.dtype, computed]
        return digest({"pixels": pixels, "made_by": made_by, "version": VERSION})

    def tasks(self, progress: bool) -> tuple[list[Task], list[Failure]]:
        """What is left to do, and the slides that cannot be done."""
        known = {slide_id: self.store.pixels(slide_id) for slide_id in self.store.slide_ids}
        unknown = [s for s, pixels in known.items() if pixels is None or self.missing(s, pixels)]
        slides, failures = self.store.plan(unknown, self.settings.planners, progress)
        tasks = []
        for slide in slides:
            if files := self.missing(slide.slide_id, slide.pixels):
                multiples = sorted({self.grid.column(path)[1] for path in files})
                tasks.append(Task(slide, multiples, files))
        return tasks, failures

    def wanted(self, task: Task) -> set[str]:
        """The encoders that a task still needs."""
        return {self.grid.column(path)[0] for path in task.files}

    def warnings(self) -> list[str]:
        """Where an encoder will see tiles unlike those it was trained on."""
        px, mpps, lines = self.store.tile_px, [self.store.mpp * k for k in self.multiples], []
        for name, definition in ((m.name, m.definition) for m in self.models.values()):
            if definition is None:
                continue
            native = definition.mpp
            if native and not any(abs(mpp / own - 1) < 0.05 for mpp in mpps for own in native):
                lines.append(
                    f"{name} was trained at {_list(native)} µm/px, none of {_list(mpps)} is that"
                )
            if definition.input.resize and definition.tile_px != px:
                seen = _list([mpp * px / definition.tile_px for mpp in mpps])
                lines.append(
                    f"{name} is fed tiles of {definition.tile_px} px by its authors: resized ones of"
                    f" {px} px look to it like {seen} µm/px; --tile-px {definition.tile_px} does not"
                )
        return lines


def _list(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)


def extract(
    store: Store,
    encoders: Sequence[EncoderLike],
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Extracted:
    """Encodes every tile of a store with every encoder; a file there under the same recipe is skipped.

    Several processes may work on one folder: each slide is done by one of them, and what a killed one
    left is taken over. A slide that fails is listed and stops no other.

    Args:
        store: of `data.stores`. out: where the grid's folder goes, default where it is.
        encoders: fixed encoders' names, or folders, see `encoders.load`; or an `Encoder`, as precise as it is.
        settings: of `choose`.

    Raises:
        UserError: wrong arguments, or no slide at all could be encoded. OSError: the disk is full.
    """
    chosen = choose(**settings)
    run = Run(store, encoders, out, chosen)
    if progress:
        for line in run.warnings():
            print(f"warning: {line}")
    store.start()
    claims = Claims(run.grid.root / ".claims")
    with claims.living(), contextlib.closing(store):
        tasks, failures = run.tasks(progress)
        skipped = len(store.slide_ids) - len(tasks) - len(failures)
        for failed in failures:
            tell(run.grid.root, {"state": "failed", "encoders": ",".join(run.models), **failed})
        speed, done = Speed(), 0
        if tasks:  # else there is nothing to compile for
            devices = Devices(list(run.models.values()), chosen.batch, store.tile_px)
            done, failed = _encode_all(run, tasks, devices, claims, speed, progress)
            skipped += len(tasks) - done - len(failed)
            failures += failed
    write_tables(run.grid.root, store.slide_ids)
    folders = {(name, run.grid.mpp * k): path for (name, k), path in run.grid.folders.items()}
    failures.sort(key=lambda failed: failed["slide_id"])
    if failures and not done and not skipped:
        first = failures[0]
        raise UserError(
            f"none of the {len(failures)} slides could be encoded; {first['slide_id']}: {first['reason']}",
            f"{first['cure']}. All reasons and cures: {run.grid.root / 'extraction_errors.csv'}",
        )
    return Extracted(folders, failures, done, skipped, speed)


def _encode_all(
    run: Run, tasks: list[Task], devices: Devices, claims: Claims, speed: Speed, progress: bool
) -> tuple[int, list[Failure]]:
    """Encodes what is free, then waits for what other processes have, should they die over it."""
    done, failures, waiting = 0, [], tasks
    total = sum(task.tiles for task in tasks)
    with tqdm(total=total, desc="extract", unit="tile", disable=not progress) as bar:
        while waiting:
            free, held = [], []
            for task in waiting:
                (held if claims.held(task.slide.slide_id) else free).append(task)
            waiting = held
            if free:
                arrivals = Arrivals(free, run.grid, devices.widths, claims)
                _one_pass(run, arrivals, devices, speed, bar)
                done += len(arrivals.done)
                failures += arrivals.failures
                waiting += arrivals.left
            still = [task for task in waiting if task.missing()]  # others have done the rest
            bar.total -= sum(task.tiles for task in waiting) - sum(task.tiles for task in still)
            waiting = still
            if waiting and all(claims.held(task.slide.slide_id) for task in waiting):
                bar.set_postfix_str(f"{len(waiting)} slides are with other processes")
                time.sleep(POLL)
    return done, failures


def _one_pass(run: Run, arrivals: Arrivals, devices: Devices, speed: Speed, bar: tqdm) -> None:
    """One stream over all tasks; those that another process has are left."""
    wanted = [run.wanted(task) for task in arrivals.tasks]
    items = stream(Tiles(run.store, arrivals.tasks, arrivals.claims), run.settings.workers)
    try:
        for parts, features in devices.encode(items, wanted.__getitem__, speed):
            bar.update(arrivals.receive(parts, features))
            bar.set_postfix_str(f"data-wait {speed.data_wait:.0%}", refresh=False)
    except Lost as lost:
        arrivals.lose(lost.slide_ids, lambda slide_id: failure(slide_id, CRASHED))
    finally:
        arrivals.discard()


# ---- dry run ---------------------------------------------------------------------------------------


def describe(
    store: Store, encoders: Sequence[EncoderLike], *, out: str | Path | None = None, **settings: Any
) -> str:
    """What an extraction would do. Reads no pixels and writes nothing."""
    run = Run(store, encoders, out, choose(**settings))
    lines = [str(run.grid.root)]
    lines += [_about(model) for model in run.models.values()]
    lines += [f"warning: {line}" for line in run.warnings()]
    widths = {name: _width(model, store.tile_px) for name, model in run.models.items()}
    size = np.dtype(run.settings.dtype).itemsize
    tiles, written, done = collections.Counter(), 0, 0
    slides = store.sizes()
    for slide in slides:
        files = run.missing(slide.slide_id, slide.pixels)
        done += not files
        columns = [run.grid.column(path) for path in files]
        written += sum(slide.count(k) * (widths[name] * size + ROW_BYTES) for name, k in columns)
        tiles.update({k: slide.count(k) for k in {k for _, k in columns}})
    lines.append(f"{len(store.slide_ids)} slides, {done} of them done")
    lines += [f"{store.mpp * k:g} µm/px: {tiles[k]} tiles to encode" for k in run.multiples]
    lines.append(f"{written / 1e9:.3g} GB to be written, features as {run.settings.dtype}")
    if unknown := len(store.slide_ids) - len(slides):
        lines.append(f"and what {unknown} slides need whose tissue has not been outlined yet")
    return "\n".join(lines)


def _about(model: Encoder) -> str:
    definition = model.definition
    if definition is None:
        return model.name
    native = f"{_list(definition.mpp)} µm/px" if definition.mpp else "any µm/px"
    terms = f"; {definition.terms}" if definition.terms else ""
    return (
        f"{model.name}: {definition.width} features, trained at {native}, on tiles of"
        f" {definition.tile_px} px; {definition.licence}{terms}"
    )


def _width(model: Encoder, px: int) -> int:
    images = {"image": jax.ShapeDtypeStruct((1, px, px, 3), np.uint8)}
    return jax.eval_shape(model.apply, model.params, images).shape[-1]
