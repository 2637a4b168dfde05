"""Writing features slide by slide: what a disk refuses, and what the tables tell."""

from __future__ import annotations

import errno
import os
import shutil

import h5py
import jax.numpy as jnp
import pytest

from pathme_jax.encoders import arrivals, descriptors, encoder
from pathme_jax.encoders.extraction import extract_slides
from pathme_jax.errors import UserError
from pathme_jax.files import read_csv
from pathme_jax.records import features

QUIET = {"progress": False, "dtype": "float32", "workers": 0}
SMALL = {"tile_px": 32, "mpps": [0.5, 2.0, 8.0]}  # fields of 128 px: for slides of 1100


@pytest.fixture
def huge(monkeypatch):
    """An encoder of features that float16 cannot hold."""

    def encode(images):
        return 1e6 + descriptors.mean_rgb(jnp.asarray(images))

    monkeypatch.setitem(encoder.FIXED, "huge", encode)
    return "huge"


@pytest.mark.parametrize("folder", ["patches", "features_mean_rgb"])
def test_a_full_disk_that_hdf5_meets_ends_the_run(folder, slides, tmp_path, monkeypatch):
    as_it_is = h5py.File.__exit__

    def full(file, *error):
        if f"/{folder}/" not in file.filename:
            return as_it_is(file, *error)
        raise RuntimeError(f"unable to close file, error message = '{os.strerror(errno.EDQUOT)}'")

    monkeypatch.setattr(h5py.File, "__exit__", full)
    with pytest.raises(OSError) as caught:
        extract_slides(slides, tmp_path / "o", ["mean_rgb"], **QUIET, **SMALL)
    assert caught.value.errno == errno.EDQUOT


def test_files_that_fit_each_alone_but_not_together_are_not_begun(slides, tmp_path, monkeypatch):
    asked = []

    def usage(folder):
        asked.append(folder)
        free = 5 * features._ROOM // 2  # three files: three magnifications
        return shutil._ntuple_diskusage(free, 0, free)

    monkeypatch.setattr(features.shutil, "disk_usage", usage)
    with pytest.raises(OSError) as caught:
        extract_slides(slides, tmp_path / "o", ["mean_rgb"], **QUIET, **SMALL)
    assert caught.value.errno == errno.ENOSPC and len(asked) == 1


@pytest.mark.parametrize("when", ["opened", "written", "closed"])
@pytest.mark.parametrize(
    "error", [BlockingIOError(errno.EAGAIN, "lock refused"), RuntimeError("unable to close file")]
)
def test_a_file_that_cannot_be_written_costs_its_slide(slides, tmp_path, monkeypatch, when, error):
    method, of = {
        "opened": ("__init__", features.FeatureFile),
        "written": ("append", features.FeatureFile),
        "closed": ("finish", arrivals.SlideFiles),
    }[when]
    as_it_is, calls = getattr(of, method), []

    def fail_first(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return as_it_is(*arguments)

    monkeypatch.setattr(of, method, fail_first)
    done = extract_slides(slides, tmp_path / "o", ["mean_rgb"], **QUIET, **SMALL)
    assert done.done == 1 and [e["slide_id"] for e in done.errors] == ["a"]
    assert f"cannot be written ({error})" in done.errors[0]["reason"]
    assert not list((tmp_path / "o").rglob("features_*/.*"))


def test_a_failure_that_cannot_be_kept_is_still_told(slides, write_tiff, tmp_path, monkeypatch):
    def refuse(root, row):
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr(arrivals, "tell", refuse)
    with pytest.raises(UserError, match=r"none of the 2 slides.*not yours"):
        extract_slides(slides, tmp_path / "o", ["mean_rgb"], **QUIET, **SMALL)


def test_the_tables_are_of_this_runs_slides_and_know_of_earlier_encoders(slides, tmp_path):
    def run(encoder: str) -> dict[str, dict[str, str]]:
        extract_slides(slides, tmp_path / "o", [encoder], **QUIET, **SMALL)
        (root,) = (tmp_path / "o").glob("20x-*")
        (root / "extraction" / ".b.elsewhere-1-5eed.tmp.json").write_text("{")
        return {row["slide_id"]: row for row in read_csv(root / "extraction.csv")}

    assert {s: row["stored"] for s, row in run("mean_rgb").items()} == {
        "a": "mean_rgb",
        "b": "mean_rgb",
    }
    (slides / "a.tiff").unlink()
    (row,) = run("hed_texture").values()
    assert (row["slide_id"], row["encoders"]) == ("b", "hed_texture")
    assert row["stored"] == "hed_texture,mean_rgb"
    (kept,) = (tmp_path / "o").rglob("extraction/b.json")
    kept.write_text("half")
    assert run("mean_rgb") == {}, "a damaged row is left out"


def test_a_failed_row_names_the_encoders_it_is_about(slides, huge, tmp_path):
    how = {**QUIET, **SMALL, "dtype": "float16"}
    extract_slides(slides, tmp_path / "o", ["mean_rgb"], **how)
    with pytest.raises(UserError, match="none of the 2"):
        extract_slides(slides, tmp_path / "o", [huge], **how)
    (table,) = (tmp_path / "o").glob("20x-*/extraction.csv")
    for row in read_csv(table):
        assert (row["state"], row["encoders"], row["stored"]) == ("failed", "huge", "mean_rgb")
