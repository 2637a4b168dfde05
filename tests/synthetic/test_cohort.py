"""A cohort: balanced labels, the same bytes however it was made, nothing done twice."""

import collections
import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_prep import synthesize
from pathme_jax.errors import UserError
from pathme_jax.synthetic.cohort import COLUMNS, label_table, write_cohort

SMALL = {"slides": 3, "size": 1024, "seed": 7, "progress": False}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A cohort made in one go, in one process; tests must not write to it."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), workers=1, **SMALL)


def test_files_and_labels(cohort):
    slides = [f"slides/s000{i}.tiff" for i in range(3)]
    assert sorted(contents(cohort)) == ["labels.csv", "recipe.json", *slides]
    with open(cohort / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [row["slide_id"] for row in rows] == ["s0000", "s0001", "s0002"]
    assert [row["case_id"] for row in rows] == ["c000", "c000", "c001"]


@pytest.mark.parametrize(("slides", "per_case"), [(40, 2), (40, 1), (13, 3), (5, 1), (1, 2)])
def test_label_cells_are_balanced_over_cases(slides, per_case):
    rows = label_table(slides, seed=1, slides_per_case=per_case)
    assert len(rows) == len({row["slide_id"] for row in rows}) == slides
    cases = collections.defaultdict(set)
    for row in rows:
        assert row["subtype"] == row["detail"] ^ row["architecture"]
        outcome = (row["detail"], row["architecture"], row["os_months"], row["os_event"])
        cases[row["case_id"]].add(outcome)
    assert all(len(outcomes) == 1 for outcomes in cases.values())  # one truth per case
    cells = collections.Counter(next(iter(outcomes))[:2] for outcomes in cases.values())
    counts = [cells[d, a] for d in (0, 1) for a in (0, 1)]
    assert max(counts) - min(counts) <= 1


def test_ids_do_not_follow_the_labels():
    orders = {
        tuple((row["detail"], row["architecture"]) for row in label_table(16, seed, 1))
        for seed in range(10)
    }
    assert len(orders) == 10


def test_survival_depends_on_both_labels_and_is_censored():
    rows = label_table(4000, seed=2, slides_per_case=1)
    months, event, detail, architecture = (
        np.array([row[key] for row in rows])
        for key in ("os_months", "os_event", "detail", "architecture")
    )
    assert 0.6 < event.mean() < 0.7
    rate = {  # deaths per month at risk: the maximum-likelihood hazard
        cell: event[on].sum() / months[on].sum()
        for cell in [(0, 0), (0, 1), (1, 0), (1, 1)]
        for on in [(detail == cell[0]) & (architecture == cell[1])]
    }
    for one, other in [((1, 0), (0, 0)), ((0, 1), (0, 0)), ((1, 1), (1, 0)), ((1, 1), (0, 1))]:
        assert 1.9 < rate[one] / rate[other] < 2.6
    assert months.min() > 0


def test_workers_do_not_change_the_bytes(cohort, tmp_path):
    write_cohort(tmp_path, workers=2, **SMALL)
    assert contents(tmp_path) == contents(cohort)


def test_another_seed_is_another_cohort(cohort, tmp_path):
    write_cohort(tmp_path, workers=1, **{**SMALL, "slides": 1, "seed": 8})
    assert contents(tmp_path)["slides/s0000.tiff"] != contents(cohort)["slides/s0000.tiff"]


def test_a_rerun_draws_only_what_is_missing(cohort, tmp_path):
    for name, content in contents(cohort).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "slides/s0001.tiff").unlink()
    (tmp_path / "slides/.s0001.4242.tmp.tiff").write_bytes(b"half a slide")
    (tmp_path / "labels.csv").unlink()
    kept = tmp_path / "slides/s0000.tiff"
    before = kept.stat()
    write_cohort(tmp_path, workers=1, **SMALL)
    after = kept.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert contents(tmp_path) == contents(cohort)


def test_killed_and_rerun_ends_the_same_and_leaves_no_process(tmp_path):
    psutil = pytest.importorskip("psutil")
    command = [sys.executable, "-m", "data_prep.synthesize", "--out", str(tmp_path / "killed")]
    command += ["--slides", "4", "--size", "1024", "--seed", "7"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("killed/slides/s*.tiff")):
        assert run.poll() is None
        time.sleep(0.02)
    family = psutil.Process(run.pid).children(recursive=True)
    assert len(family) >= 2
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert not (tmp_path / "killed/labels.csv").exists()
    subprocess.run(command, check=True, capture_output=True)
    arguments = {**SMALL, "slides": 4}
    assert contents(tmp_path / "killed") == contents(write_cohort(tmp_path / "whole", **arguments))


def test_a_changed_recipe_is_refused_and_says_so(cohort):
    before = contents(cohort)
    with pytest.raises(UserError, match=r"seed 7, now 9.*Choose another folder"):
        write_cohort(cohort, workers=1, **{**SMALL, "seed": 9})
    assert contents(cohort) == before


def test_foreign_slides_are_refused(tmp_path):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/mine.tiff").write_bytes(b"a slide of the user's")
    with pytest.raises(UserError, match=r"recipe\.json is missing"):
        write_cohort(tmp_path, workers=1, **SMALL)
    assert list(contents(tmp_path)) == ["slides/mine.tiff"]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (("--size", "1000"), "--size 1000 is not a multiple of 1024 px. Try 1024"),
        (("--size", "0"), "--size 0 is not a multiple"),
        (("--slides", "0"), "--slides 0 is too small. Give at least 1"),
        (("--seed", "-1"), "--seed -1 is too small. Give at least 0"),
        (("--workers", "0"), "--workers 0 is too small"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(tmp_path, capsys, argument, said):
    with pytest.raises(SystemExit) as stopped:
        synthesize.main(["--out", str(tmp_path / "new"), *argument])
    assert stopped.value.code == 2
    assert said in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert not (tmp_path / "new").exists()
