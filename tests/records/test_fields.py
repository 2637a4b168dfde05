"""Field records: the same bytes every time, readable by TFDS and Grain, damage named."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from absl import flags

from pathme_jax.errors import UserError
from pathme_jax.files import write_csv, write_json
from pathme_jax.records import fields
from pathme_jax.records.fields import FieldSource, ViewSource

ROOT = Path(__file__).parents[2]


def record(slide_id: str, row: int, col: int) -> dict:
    rng = np.random.default_rng([ord(slide_id[0]), row, col])
    return {
        "image": fields.encode(rng.integers(0, 256, (64, 64, 3), np.uint8)),
        "slide_id": slide_id,
        "grid": np.array([row, col], np.int32),
        "level0_xy": np.array([col * 2**33, row], np.int64),
        "level0_size": np.array([64, 64], np.int64),
        "mpp": np.float32(0.5),
        "slide_mpp": np.float32(0.25),
        "tissue": rng.random((4, 4)) < 0.5,
        "recipe": "1a2b3c4d",
    }


@pytest.fixture
def grid_dir(tmp_path):
    """Slides b (3 fields), a (2 fields), failed c; no views."""
    folder = tmp_path / "20x-1a2b3c4d"
    none = {"records": 0, "bytes": 0, "sha256": ""}
    sidecars = {}
    for slide_id, count in (("b", 3), ("a", 2)):
        records = [fields.serialise(fields.FIELDS, record(slide_id, 0, i)) for i in range(count)]
        shard = fields.write_shard(folder / "fields" / f"{slide_id}.array_record", records)
        sidecars[slide_id] = {"fields": shard, "views": none}
        write_json(fields.sidecar_path(folder, slide_id), sidecars[slide_id])
    fields.write_tfds(folder, sidecars)
    rows = [("b", "done"), ("a", "no_region"), ("c", "failed")]
    rows = [{"slide_id": slide, "state": state} for slide, state in rows]
    write_csv(folder / "slides.csv", rows, ["slide_id", "state"])
    return folder


def same(read: dict, wrote: dict) -> None:
    assert read.keys() == wrote.keys()
    for key, value in wrote.items():
        assert np.array_equal(read[key], value), key


def test_records_come_back_as_written_by_slide_then_position(grid_dir):
    source = FieldSource(grid_dir)
    assert source.slide_ids == ["a", "b"] and source.ranges == {"a": range(2), "b": range(2, 5)}
    assert len(source) == 5
    for slide_id, indices in source.ranges.items():
        for i, index in enumerate(indices):
            same(source[index], record(slide_id, 0, i))
    same(source[-1], record("b", 0, 2))
    with pytest.raises(IndexError):
        source[5]
    assert source[0]["tissue"].dtype == bool and source[0]["grid"].dtype == np.int32


def test_some_slides_and_no_views(grid_dir):
    same(FieldSource(grid_dir, ["b"])[0], record("b", 0, 0))
    assert len(ViewSource(grid_dir)) == 0 and ViewSource(grid_dir).slide_ids == []


def test_views_have_their_own_cells(tmp_path):
    view = record("a", 0, 0)
    view["fields"] = view.pop("tissue")
    same(fields.parse(fields.VIEWS, fields.serialise(fields.VIEWS, view)), view)


def test_the_same_record_is_the_same_bytes_in_every_process(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests/records'); import test_fields as t, hashlib;"
        "print(hashlib.sha256(t.fields.serialise('fields', t.record('a', 1, 2))).hexdigest())"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(hashes) == 1


def test_tfds_reads_them_without_tensorflow(grid_dir):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(grid_dir / "tfds" / "pathme_fields" / "1.0.0")
    data = builder.as_data_source(split="train")
    assert len(data) == 5
    expected = record("b", 0, 1)
    assert (data[3]["image"] == fields.decode(expected["image"])).all()
    assert data[3]["slide_id"] == b"b"
    assert (data[3]["tissue"] == expected["tissue"]).all()
    assert "tensorflow" not in sys.modules


def test_tfds_metadata_follows_the_set_of_slides(grid_dir):
    import tensorflow_datasets as tfds

    folder = grid_dir / "tfds" / "pathme_fields" / "1.0.0"
    sidecars = FieldSource(grid_dir).sidecars
    before = folder.stat().st_ino
    fields.write_tfds(grid_dir, sidecars)
    assert folder.stat().st_ino == before, "nothing changed, nothing written"
    fields.write_tfds(grid_dir, {"b": sidecars["b"]})
    assert len(tfds.builder_from_directory(folder).as_data_source(split="train")) == 3
    assert str(grid_dir) not in (folder / "dataset_info.json").read_text()


def test_without_hard_links_the_shards_are_copied(grid_dir, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    fields.write_tfds(grid_dir, {"a": FieldSource(grid_dir).sidecars["a"]})
    (shard,) = (grid_dir / "tfds" / "pathme_fields" / "1.0.0").glob("*array_record*")
    assert shard.read_bytes() == (grid_dir / "fields" / "a.array_record").read_bytes()


def test_grain_reads_it_here_and_in_spawned_workers(grid_dir):
    source = FieldSource(grid_dir)
    source[0]  # a reader is open, which no pickle can hold
    assert repr(pickle.loads(pickle.dumps(source))) == repr(source)
    ids = grain.MapDataset.source(source).map(_slide_and_column)
    assert list(ids) == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2)]
    flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags
    process = grain.MultiprocessingOptions(num_workers=1)
    assert list(ids.to_iter_dataset().mp_prefetch(process)) == list(ids)


def test_an_unpickled_source_leaves_no_import_to_threads(grid_dir, tmp_path):
    """Threads of a worker that all import TFDS can wait for each other for ever."""
    (tmp_path / "source").write_bytes(pickle.dumps(FieldSource(grid_dir)))
    code = """
import pickle, sys
source = pickle.load(open(sys.argv[1], "rb"))
before = set(sys.modules)
source[1]
print(sorted(set(sys.modules) - before))
"""
    run = [sys.executable, "-c", code, str(tmp_path / "source")]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def _slide_and_column(record):
    return record["slide_id"], int(record["grid"][1])


def test_damage_is_named(grid_dir):
    shard = grid_dir / "fields" / "a.array_record"
    size = shard.stat().st_size
    data = bytearray(shard.read_bytes())
    data[200:5000] = bytes(4800)
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.array_record: record 0 cannot be read"):
        FieldSource(grid_dir)[0]
    os.truncate(shard, size // 2)
    with pytest.raises(UserError, match=rf"a\.array_record: {size // 2} bytes, expected {size}"):
        FieldSource(grid_dir)
    shard.unlink()
    with pytest.raises(UserError, match=r"a\.array_record: 0 bytes"):
        FieldSource(grid_dir)
    assert len(FieldSource(grid_dir, ["b"])) == 3, "another slide's damage does not matter"
    with pytest.raises(UserError, match=r"c\.json: missing"):
        FieldSource(grid_dir, ["c"])
    with pytest.raises(UserError, match=r"slides\.csv"):
        FieldSource(grid_dir.parent)


def test_a_failing_record_leaves_no_shard(tmp_path):
    def records():
        yield b"one"
        raise UserError("corrupt tile", "copy it again")

    with pytest.raises(UserError, match="corrupt tile"):
        fields.write_shard(tmp_path / "a.array_record", records())
    assert not list(tmp_path.iterdir())


def test_area_average_is_the_mean_of_blocks():
    image = np.random.default_rng(0).integers(0, 256, (64, 32, 3), np.uint8)
    blocks = image.reshape(16, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(fields.area_average(image) - blocks).max() <= 0.5
    checkers = np.indices((64, 64)).sum(0, keepdims=True).T.repeat(3, 2) % 2 * 200
    assert (fields.area_average(checkers.astype(np.uint8)) == 100).all(), "fine texture vanishes"
    with pytest.raises(ValueError, match="30×32"):
        fields.area_average(image[:30])


def test_jpeg_keeps_colour_at_full_resolution():
    """4:2:0 would smear single-pixel stain."""
    image = np.full((64, 64, 3), 200, np.uint8)
    image[::2, :, 1] = 120
    again = fields.decode(fields.encode(image)).astype(int)
    assert np.abs(again - image).mean() < 3
