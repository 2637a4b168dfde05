"""`python -m pathme_jax.evaluate` on feature files: finds what is there, and keeps patients apart."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from pathme_jax import evaluate
from pathme_jax.evaluation import frozen
from pathme_jax.evaluation.protocols import PROTOCOLS
from pathme_jax.files import read_csv, write_csv
from pathme_jax.records.features import write_features

ATTRS = {"encoder": "toy", "recipe": "r", "name": "s"}


def write_set(
    folder: Path, signal: float, cases: int = 30, slides: int = 2, width: int = 96, seed: int = 0
):
    """`slides` slides a case; every case has a place of its own besides the class's `signal`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for case in range(cases):
        label = case % 2
        own = 0.5 * rng.normal(size=width)
        for slide in range(slides):
            name = f"c{case}s{slide}"
            x = rng.normal(size=(12, width)) + own + signal * label * np.eye(width)[0]
            write_features(
                folder / f"{name}.h5",
                features=x.astype(np.float32),
                coords=np.zeros((12, 2)),
                grid=np.zeros((12, 2)),
                attrs={**ATTRS, "recipe": f"{signal}-{seed}"},
            )
            rows.append({"case_id": f"c{case}", "slide_id": name, "grade": "ab"[label]})
    return rows


@pytest.fixture
def labelled(tmp_path):
    rows = write_set(tmp_path / "good", 4.0)
    write_set(tmp_path / "noise", 0.0, seed=1)
    write_csv(tmp_path / "labels.csv", rows, ["case_id", "slide_id", "grade"])
    return tmp_path


def arguments(folder, *more, features=("good",)):
    return [
        *("--features", *(str(folder / name) for name in features)),
        *("--labels", str(folder / "labels.csv"), "--task", "grade", "--out", str(folder / "out")),
        *("--draws", "100", "--folds", "3", *more),
    ]


def test_the_users_folds_are_used(labelled):
    """One of them trains on a single class, and is left out."""
    rows = read_csv(labelled / "labels.csv")
    for i, row in enumerate(rows):
        case = i // 2
        row["fold_0"] = "train" if row["grade"] == "a" else "test"
        row["fold_1"] = "test" if case < 6 else "train"
    write_csv(labelled / "labels.csv", rows, list(rows[0]))
    evaluate.main(arguments(labelled))
    (metrics,) = (labelled / "out").rglob("metrics.json")
    found = json.loads(metrics.read_text())
    assert found["folds_left_out"] == ["fold_0: fewer than two classes to train on"]
    tested = {row["case_id"] for row in read_csv(metrics.with_name("predictions.csv"))}
    assert tested == {f"c{i}" for i in range(6)}


def test_unis_protocol_tells_a_signal_from_noise_and_says_by_how_much(labelled, capsys):
    evaluate.main(arguments(labelled, features=("noise", "good")))
    printed = capsys.readouterr().out
    folder = Path(printed.splitlines()[-1])
    found = json.loads((folder / "metrics.json").read_text())
    good, noise = found["features"]["good"], found["features"]["noise"]
    for probe in ("linear", "knn20", "prototypes"):
        assert good[probe]["auroc"]["interval"][0] > 0.7, probe
        assert noise[probe]["auroc"]["interval"][0] < 0.6, probe
        gain = found["comparison"]["good - noise"][probe]
        assert gain["interval"][0] > 0 and gain["permutation_p"] < 0.05
    assert (
        good["8-shot"]["balanced_accuracy"]["value"] > good["1-shot"]["balanced_accuracy"]["value"]
    )
    assert good["retrieval"]["map"]["value"] > noise["retrieval"]["map"]["value"]
    assert good["linear"]["auroc"]["permutation_p"] < 0.05
    assert found["settings"]["sources"].keys() >= {"linear", "retrieval"}
    assert {row["probe"] for row in read_csv(folder / "table.csv")} >= {
        "linear",
        "retrieval",
        "1-shot",
    }


@pytest.mark.parametrize("protocol", ["patho-bench", "gpfm", "eva"])
def test_each_protocol_runs_what_it_is_made_of(labelled, protocol, monkeypatch):
    if protocol == "eva":  # 12,500 steps take their time
        short = dataclasses.replace(PROTOCOLS["eva"].linear, steps=200, rate=1e-2, final_rate=1e-2)
        monkeypatch.setitem(PROTOCOLS, "eva", dataclasses.replace(PROTOCOLS["eva"], linear=short))
    found = frozen.run(
        [labelled / "good"],
        labelled / "labels.csv",
        "grade",
        labelled / "out",
        protocol=protocol,
        draws=50,
        folds=2,
    )
    expected = {
        "patho-bench": {"linear", "retrieval"},
        "gpfm": {"linear", "knn1", "knn20", "retrieval"},
        "eva": {"linear"},
    }
    assert set(found["features"]["good"]) == expected[protocol]
    assert found["features"]["good"]["linear"]["auroc"]["value"] > 0.75


def test_tiles_of_a_patient_are_never_on_both_sides(labelled):
    """Without signal, cases are still told apart by their own place: only a leak makes that useful."""
    found = frozen.run(
        [labelled / "noise"],
        labelled / "labels.csv",
        "grade",
        labelled / "out",
        level="tile",
        draws=50,
        tiles_per_slide=5,
        protocol="gpfm",
    )
    assert found["rows"] == 300
    assert found["features"]["noise"]["knn1"]["balanced_accuracy"]["value"] < 0.65


def test_a_probe_that_its_penalty_has_silenced_is_told(tmp_path, capsys):
    rows = write_set(tmp_path / "narrow", 0.5, width=3)
    write_csv(tmp_path / "labels.csv", rows, ["case_id", "slide_id", "grade"])
    evaluate.main(arguments(tmp_path, features=("narrow",)))
    assert "the linear probe of 3 of 3 folds says the same of every row" in capsys.readouterr().out
    evaluate.main(arguments(tmp_path, "--protocol", "patho-bench", features=("narrow",)))
    assert "says the same" not in capsys.readouterr().out


def test_a_second_run_reads_what_the_first_left(labelled, monkeypatch):
    first = frozen.run(
        [labelled / "good"], labelled / "labels.csv", "grade", labelled / "out", draws=20, folds=2
    )
    monkeypatch.setattr(frozen, "_evaluate", lambda *_: pytest.fail("evaluated again"))
    again = frozen.run(
        [labelled / "good"], labelled / "labels.csv", "grade", labelled / "out", draws=20, folds=2
    )
    assert again == first


def test_a_slide_that_one_set_lacks_is_left_out_of_both_and_named(labelled):
    (labelled / "noise" / "c3s1.h5").unlink()
    found = frozen.run(
        [labelled / "good", labelled / "noise"],
        labelled / "labels.csv",
        "grade",
        labelled / "out",
        draws=20,
        folds=2,
        protocol="patho-bench",
    )
    assert found["slides"] == 59
    assert [p["slide_id"] for p in found["problems"]["good"]] == ["c3s1"]
    assert found["problems"]["noise"][0]["reason"] == "no features in noise"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--task", "stage"), "no column 'stage'"),
        (("--features", "nowhere"), "none of the 60 labelled slides"),
    ],
)
def test_what_cannot_be_done_is_one_line(labelled, more, message, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(arguments(labelled, *more))
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said


def test_the_launcher_offers_every_protocol_there_is():
    assert set(evaluate.PROTOCOLS) == set(PROTOCOLS)
