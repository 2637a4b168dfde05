"""Fields and region views on disk: one ArrayRecord shard per slide, and TFDS metadata over all of them.

    <grid>/recipe.json                      what decides the pixels; its digest is in the folder's name
    <grid>/slides.csv                       the slides of the last run and their state
    <grid>/fields/<slide>.array_record      FIELD records, by row, then column
    <grid>/fields/<slide>.json              sidecar, written last: this slide is done
    <grid>/views/<slide>.array_record       VIEW records, one per region; absent where there is none
    <grid>/tfds/pathme_fields/1.0.0/        the same shards for `tfds.builder_from_directory`

Records are tf.train.Example, as TFDS writes them, without TensorFlow. A field of a slide is SPAN × SPAN
tiles; one of a folder of images (`slides.images`) is a single tile, and such folders hold no views.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import resource
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, full_disk_told, read_csv, read_json, write_json
from pathme_jax.slides.grid import SPAN

SCHEMA = 1
FIELDS, VIEWS = "fields", "views"
CELLS = {FIELDS: "tissue", VIEWS: "fields"}  # what a record says of the cells it is made of
DONE_STATES = ("done", "no_region")
QUALITY, SUBSAMPLING = 90, "444"


# --- pixels


def encode(image: np.ndarray) -> bytes:
    """(h, w, 3) uint8 RGB as JPEG, chroma kept at full resolution: stain colour is signal."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), QUALITY, "RGB", SUBSAMPLING)


def decode(jpeg: bytes) -> np.ndarray:
    """(h, w, 3) uint8 RGB."""
    return simplejpeg.decode_jpeg(jpeg, "RGB")


def area_average(image: np.ndarray, factor: int = SPAN) -> np.ndarray:
    """The coarser view of a field: means of factor × factor pixels, (h/factor, w/factor, 3) uint8.

    JPEG's own scaled decoding is quicker but no area average: texture that must vanish would not.
    """
    height, width = image.shape[:2]
    if height % factor or width % factor:
        raise ValueError(f"{height}×{width} px do not divide into {factor}×{factor} blocks")
    size = (width // factor, height // factor)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


# --- schema


@functools.cache
def features(kind: str, cells: int = SPAN) -> Any:
    """The `tfds.features.FeaturesDict` of FIELDS or VIEWS; `cells` of them along a record's side."""
    import tensorflow_datasets as tfds  # half a second, and not needed for --help

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "slide_id": tfds.features.Text(),
            "grid": tfds.features.Tensor(shape=(2,), dtype=np.int32),  # row, column
            "level0_xy": tfds.features.Tensor(shape=(2,), dtype=np.int64),
            "level0_size": tfds.features.Tensor(shape=(2,), dtype=np.int64),  # width, height
            "mpp": np.float32,
            "slide_mpp": np.float32,
            # FIELDS: which tiles are tissue; VIEWS: which of the region's fields are stored
            CELLS[kind]: tfds.features.Tensor(shape=(cells, cells), dtype=np.bool_),
            "recipe": tfds.features.Text(),
        }
    )


def serialise(kind: str, record: Mapping[str, Any]) -> bytes:
    """One record, `image` given as JPEG bytes, as the same bytes every time."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    schema = features(kind, len(record[CELLS[kind]]))
    serializer = ExampleSerializer(schema.get_serialized_info())
    example = serializer.get_tf_example(schema.encode_example(record))
    return example.SerializeToString(deterministic=True)


def parse(kind: str, record: bytes, cells: int = SPAN) -> dict[str, Any]:
    """The record again, `image` still JPEG bytes, text as str."""
    import tensorflow_datasets as tfds

    skip = {"image": tfds.decode.SkipDecoding()}
    example: Any = features(kind, cells).deserialize_example_np(record, decoders=skip)
    example["slide_id"] = example["slide_id"].decode()
    example["recipe"] = example["recipe"].decode()
    return example


# --- writing


def write_shard(path: Path, records: Iterable[bytes]) -> dict[str, Any]:
    """Writes serialised records under a temporary name, then renames.

    Returns:
        {"records", "bytes", "sha256"} of the shard, for its sidecar.

    Raises:
        OSError: ENOSPC or EDQUOT when the disk, or the user's share of it, is full.
    """
    with atomic(path) as temporary:
        count = 0
        with full_disk_told(path):
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            try:
                for record in records:
                    writer.write(record)
                    count += 1
            finally:
                writer.close()
        with open(temporary, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"records": count, "bytes": temporary.stat().st_size, "sha256": sha256}


def write_tfds(grid_dir: Path, sidecars: Mapping[str, Mapping[str, Any]]) -> None:
    """(Re)writes `tfds/pathme_fields/1.0.0` where the shards are not those it was made of."""
    folder = grid_dir / "tfds" / "pathme_fields" / "1.0.0"
    slide_ids = sorted(sidecars)
    shards = {slide_id: sidecars[slide_id][FIELDS] for slide_id in slide_ids}
    made_of = {"slides": shards, "schema": SCHEMA}
    if (folder / "shards.json").exists() and read_json(folder / "shards.json") == made_of:
        return
    import tensorflow_datasets as tfds
    from etils import epath

    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder),
        dataset_name="pathme_fields",
        split="train",
        filetype_suffix="array_record",
    )
    with atomic(folder) as temporary:
        temporary.mkdir()
        for i, slide_id in enumerate(slide_ids):
            name = f"pathme_fields-train.array_record-{i:05d}-of-{len(slide_ids):05d}"
            _link(grid_dir / FIELDS / f"{slide_id}.array_record", temporary / name)
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[shard["records"] for shard in shards.values()],
            num_bytes=sum(shard["bytes"] for shard in shards.values()),
            filename_template=template,
        )
        tfds.folder_dataset.write_metadata(
            data_dir=temporary,
            filename_template=template.replace(data_dir=epath.Path(temporary)),
            features=features(FIELDS, _cells(next(iter(sidecars.values())))),
            split_infos=[split],
            version="1.0.0",
            description="Fields of whole slides at exact µm/px, with their tissue tiles.",
            check_data=False,  # its check needs TensorFlow
        )
        write_json(temporary / "shards.json", made_of)


def _link(source: Path, target: Path) -> None:
    """A hard link, where the file system has none a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# --- reading


def sidecar_path(grid_dir: Path, slide_id: str) -> Path:
    return grid_dir / FIELDS / f"{slide_id}.json"


def _cells(sidecar: Mapping[str, Any]) -> int:
    """Tiles along a field of this slide."""
    return sidecar.get("cells", SPAN)


def tiled_slides(grid_dir: str | Path) -> list[str]:
    """Ids of the slides of the last run that have fields, sorted.

    Raises:
        UserError: not a folder that tiling finished.
    """
    table = Path(grid_dir) / "slides.csv"
    if not table.exists():
        raise UserError(
            f"{grid_dir}: no slides.csv, so tiling never finished here",
            "Give the folder that data_prep.tile printed (such as OUT/20x-1a2b3c4d), or run it again",
        )
    return sorted(row["slide_id"] for row in read_csv(table) if row["state"] in DONE_STATES)


class Source:
    """Random access to the records of a tiled folder, by slide_id, then row, then column.

    Picklable and safe to share between threads: shards are opened where they are read. Use it as a
    Grain source: `grain.MapDataset.source(FieldSource(grid_dir))`.

    Attributes:
        slide_ids: the slides that have records, sorted.
        ranges: slide_id → range of record indices.
        sidecars: slide_id → sidecar; `sidecar[kind]["sha256"]` tells whether a slide's records changed.
            Of a folder of images, `sidecar["names"]` holds the file name of each record, in their order.
    """

    def __init__(self, grid_dir: str | Path, kind: str, slides: Sequence[str] | None):
        self.grid_dir, self.kind = Path(grid_dir), kind
        wanted = tiled_slides(grid_dir) if slides is None else sorted(slides)
        sidecars = {slide_id: self._sidecar(slide_id) for slide_id in wanted}
        self.sidecars = {s: sidecar for s, sidecar in sidecars.items() if sidecar[kind]["records"]}
        self.slide_ids = list(self.sidecars)
        counts = [sidecar[kind]["records"] for sidecar in self.sidecars.values()]
        self._starts = [0, *itertools.accumulate(counts)]
        self.ranges = {
            slide_id: range(start, start + count)
            for slide_id, start, count in zip(self.slide_ids, self._starts, counts, strict=False)
        }
        for slide_id in self.slide_ids:
            self._check(slide_id)
        self._import_parser()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._import_parser()  # another process: Grain's workers begin with many threads at once

    def _import_parser(self) -> None:
        """Has TFDS import what it parses with, here rather than in threads: two that import it at once can wait for
        each other for ever (Python 3.11's cached_property locks across instances)."""
        if self.slide_ids:
            with contextlib.suppress(UserError):  # a damaged record is told of where it is wanted
                self[0]

    def _sidecar(self, slide_id: str) -> dict[str, Any]:
        path = sidecar_path(self.grid_dir, slide_id)
        if not path.exists():
            raise UserError(
                f"{path}: missing, so {slide_id} is not tiled",
                "Run data_prep.tile again with the same arguments",
            )
        return read_json(path)

    def _path(self, slide_id: str) -> Path:
        return self.grid_dir / self.kind / f"{slide_id}.array_record"

    def _check(self, slide_id: str) -> None:
        path, expected = self._path(slide_id), self.sidecars[slide_id][self.kind]["bytes"]
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise UserError(
                f"{path}: {found} bytes, expected {expected}",
                "Run data_prep.tile again with the same arguments: it redoes this slide",
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`features(kind)` as numpy values, `image` as JPEG bytes (see `decode`)."""
        index = range(len(self))[index]
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        slide_id = self.slide_ids[shard]
        path, sha256 = self._path(slide_id), self.sidecars[slide_id][self.kind]["sha256"]
        try:
            record = _reader(str(path), sha256).read([index - self._starts[shard]])[0]
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"{path}: record {index - self._starts[shard]} cannot be read ({error})",
                "Delete this file and run data_prep.tile again with the same arguments",
            ) from error
        return parse(self.kind, record, _cells(self.sidecars[slide_id]))

    def __repr__(self) -> str:  # Grain compares it when it resumes
        shards = {s: sidecar[self.kind]["sha256"] for s, sidecar in self.sidecars.items()}
        return f"Source({self.kind}, {len(self)} records, {digest(shards)})"


def FieldSource(grid_dir: str | Path, slides: Sequence[str] | None = None) -> Source:
    """The fields of `slides` (default: all of the last run).

    Raises:
        UserError: a shard or sidecar is missing or truncated.
    """
    return Source(grid_dir, FIELDS, slides)


def ViewSource(grid_dir: str | Path, slides: Sequence[str] | None = None) -> Source:
    """The region views of `slides` (default: all of the last run); some slides have none.

    Raises:
        UserError: a shard or sidecar is missing or truncated.
    """
    return Source(grid_dir, VIEWS, slides)


# Open shards of a process: opening one takes a sixth of the time a field's decoding does. `ulimit -n` raises it.
_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
READERS = 2**15 if _LIMIT == resource.RLIM_INFINITY else min(2**15, _LIMIT // 2)


@functools.lru_cache(maxsize=READERS)
def _reader(path: str, sha256: str) -> ArrayRecordReader:
    """One thread-safe reader per shard and process; `sha256` keeps a rewritten shard apart."""
    del sha256
    options = "readahead_buffer_size:0,max_parallelism:0"  # random access
    return ArrayRecordReader(path, options=options, file_reader_buffer_size=32768)
