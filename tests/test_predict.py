"""One command from slides to predictions: what extraction and heads say of them, and every way it can end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import h5py
import jax
import numpy as np
import pytest

from pathme_jax import predict as launcher
from pathme_jax.encoders.extraction import extract_slides
from pathme_jax.errors import UserError
from pathme_jax.files import read_csv, read_json, write_csv, write_json
from pathme_jax.mil import bags, bundle, population, prediction, saved
from pathme_jax.mil.heads import make
from pathme_jax.mil.heads.common import Bag
from pathme_jax.mil.run import run
from pathme_jax.mil.tasks import Task, Tasks
from pathme_jax.records.features import read_features

SIZES = {"hidden": 8, "attention": 4, "dropout": 0.0}
CLASSES = Task("y", "classes", ("a", "b"))
EACH = (
    CLASSES,
    Task("er+pr", "labels", ("er", "pr")),
    Task("hrd", "number"),
    Task("os", "cox"),
)
HOW = {"progress": False, "workers": 0}
FOLDS, SEEDS = 2, 2
CASES = {  # out of fold: everything right, the least sure case by .6
    "classes": [{"label": "ab"[i % 2], "score_a": 0.6 - 0.2 * (i % 2)} for i in range(10)],
    "labels": [{"label_er": 1, "score_er": 0.9, "label_pr": 1, "score_pr": 0.2}] * 10,
    "number": [{"truth": 0, "prediction": 0.1 * i} for i in range(10)],
    "cox": [{"time_months": 5, "event": 1, "risk": 100.0 * (i // 5) - 50} for i in range(10)],
}


def make_run(folder: Path, features: Path, tasks=(CLASSES,), parent: Path | None = None) -> Path:
    """What a cross-validation on these features leaves; its heads are drawn, not trained."""
    facts = saved.features_of(features, ["a", "b"], parent)
    module = make("abmil", Tasks(tasks).outputs, SIZES)
    zeros = np.zeros((1, facts["width"])), np.ones(1, bool), np.zeros((1, 2), int)
    one = module.init(jax.random.key(0), Bag(*map(jax.numpy.asarray, zeros)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 1, (4, *x.shape)).astype(np.float32), one)
    none = np.zeros((4, 0))
    fitted = population.Population(module, Tasks(tasks), params, none, none, none)
    how = dict(head="abmil", options="", sizes=SIZES, tasks=Tasks(tasks), folds=FOLDS, seeds=SEEDS)
    scales = {"hrd": [[2.0, 10.0], [3.0, 12.0]]}
    saved.save(folder / "heads", fitted, **how, features=facts, scales=scales)
    for task in tasks:
        rows = [
            {"case_id": f"p{i}", "fold": i % 2, **row} for i, row in enumerate(CASES[task.kind])
        ]
        rows = [r | {"score_b": 1 - r["score_a"]} if "score_a" in r else r for r in rows]
        write_csv(folder / task.name / "cases.csv", rows, list(rows[0]))
        write_json(
            folder / task.name / "metrics.json",
            {"measure": "auroc", "cases": 10, "too_few_to_judge": True},
        )
    return folder


def extracted(slides: Path, out: Path, mpps=(0.5,)) -> list[Path]:
    """Folders of features of mean colours, of tiles of 32 px."""
    how = {"dtype": "float32", "tile_px": 32, "mpps": list(mpps), **HOW}
    found = extract_slides(slides, out, ["mean_rgb"], **how)
    return [found.folders["mean_rgb", mpp] for mpp in mpps]


@pytest.fixture
def made(slides, tmp_path) -> bundle.Bundle:
    """A bundle of two slides' features."""
    (features,) = extracted(slides, tmp_path / "trained")
    return bundle.make(make_run(tmp_path / "run", features), "mean_rgb", tmp_path / "bundle")


@pytest.fixture
def new(tmp_path, paint, write_tiff) -> Path:
    """A slide that no head saw."""
    return write_tiff(tmp_path / "new" / "c.tiff", paint(7))


def test_a_slide_is_predicted_as_its_extracted_features_are(made, new, tmp_path):
    found = prediction.predict([new], made.folder, tmp_path / "out", threshold=0.0, **HOW)
    (features,) = extracted(new.parent, tmp_path / "apart")
    bag = read_features(features / "c.h5")
    mean, spread, attention = made.heads.predict(bag.features, bag.grid, "y")
    about = read_json(tmp_path / "out" / "c" / "prediction.json")
    assert found.slides == {"c": about} and (found.done, found.errors) == (1, [])
    told = about["tasks"]["y"]
    np.testing.assert_allclose(list(told["scores"].values()), mean, atol=1e-6)
    np.testing.assert_allclose(list(told["spread"].values()), spread, atol=1e-6)
    assert told["best"] == "ab"[mean.argmax()] and not told["abstains"]
    assert about["says"].startswith(f"{told['best']} {mean.max():.2f} (")
    assert about["use"].startswith("Research use only") and about["tiles"] == len(bag.features)
    assert about["bundle"]["hash"] == made.about["hash"] and about["encoder"] == "mean_rgb"
    with h5py.File(tmp_path / "out" / "c" / "attention.h5") as file:
        np.testing.assert_allclose(np.asarray(file["attention"]), attention, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(file["coords"]), bag.coords)
        assert set(file) == {"attention", "coords", "kind", "grid"}
        assert file["coords"].attrs["patch_size_level0"] == 32
    tiles = read_json(tmp_path / "out" / "c" / "attention.geojson")["features"]
    assert tiles[3]["geometry"]["coordinates"][0][0] == bag.coords[3].tolist()
    picture = cv2.imread(str(tmp_path / "out" / "c" / "heatmap.jpg"))
    assert picture is not None and picture.std() > 5


def test_a_cross_validation_goes_on_in_its_bundle(tmp_path, paint, write_tiff):
    """Slides, extraction, mil.run, bundle, predict. A fold's heads say of the slides they tested what stands in
    predictions.csv, classes and numbers, and all heads together know a new slide by its stain."""
    rows = ["case_id,slide_id,y,n"]
    for i in range(8):
        image = paint(i)
        if i % 2:
            image[:, :660, 1] //= 2  # stained more deeply
        write_tiff(tmp_path / "slides" / f"s{i}.tiff", image)
        rows.append(f"p{i},s{i},{'pale deep'.split()[i % 2]},{100 + 10 * (i % 2) + i}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    (features,) = extracted(tmp_path / "slides", tmp_path / "grid")
    quick = dict(epochs=30, folds=2, seeds=2, learning_rate=1e-2, hidden=8, attention=4, batch=2)
    labels = tmp_path / "labels.csv"
    found = run(features, labels, "y,number:n", tmp_path / "runs", **quick)
    made = bundle.make(Path(found["y"]["folder"]).parent, "mean_rgb", tmp_path / "bundle")
    for task, columns in (("y", ["score_deep", "score_pale"]), ("n", ["prediction"])):
        for row in read_csv(Path(found[task]["folder"]) / "predictions.csv"):
            bag = read_features(features / f"{row['slide_id']}.h5")
            scores = made.heads.scores(made.heads.answer(bag.features, bag.grid), task)
            own = scores.reshape(2, 2, -1)[int(row["fold"])].mean(0)
            np.testing.assert_allclose(own, [float(row[c]) for c in columns], rtol=1e-5, atol=2e-6)
    image = paint(70)
    image[:, :660, 1] //= 2
    new = write_tiff(tmp_path / "new.tiff", image)
    about = prediction.predict([new], made.folder, tmp_path / "out", **HOW).slides["new"]
    assert about["tasks"]["y"]["best"] == "deep" and about["tasks"]["y"]["confidence"] > 0.7
    assert 105 < about["tasks"]["n"]["prediction"] < 125 and "n: " in about["says"]


def test_it_abstains_below_the_bundles_threshold_and_says_why(made, new, tmp_path):
    assert made.about["tasks"]["y"]["rule"]["threshold"] == pytest.approx(0.6)

    def told(**more):
        found = prediction.predict([new], made.folder, tmp_path / "out", **more, **HOW)
        return found.slides["c"]

    own, sure = told(), told(threshold=1.0)
    confidence = own["tasks"]["y"]["confidence"]
    assert own["tasks"]["y"]["abstains"] == (confidence < 0.6)
    best = sure["tasks"]["y"]["best"]
    assert sure["says"] == f"abstains (best: {best} {confidence:.2f} < 1.00)"
    below = told(threshold=confidence - 1e-3)["tasks"]["y"]
    assert not below["abstains"] and told(threshold=confidence + 1e-3)["tasks"]["y"]["abstains"]


def test_without_a_threshold_that_was_right_often_enough_it_always_abstains():
    judged = prediction._withheld(0.999, None)
    told = {"kind": "classes", "best": "a", **judged}
    assert judged["abstains"] and "no threshold is known" in prediction.said(told)


def test_several_tasks_say_one_line_with_their_own_uncertainty(slides, new, tmp_path):
    (features,) = extracted(slides, tmp_path / "trained")
    made = bundle.make(make_run(tmp_path / "run", features, EACH), "mean_rgb", tmp_path / "bundle")
    found = prediction.predict([new], made.folder, tmp_path / "out", **HOW)
    told, says = found.slides["c"]["tasks"], found.slides["c"]["says"]
    assert [part.split(":")[0] for part in says.split("; ")] == ["y", "er+pr", "hrd", "os"] or (
        "no threshold" in says
    )
    assert told["er+pr"]["labels"]["pr"]["threshold"] is None  # never right
    assert told["er+pr"]["labels"]["pr"]["abstains"]
    low, high = told["hrd"]["interval"]
    assert high - low == pytest.approx(2 * 0.9) and low < told["hrd"]["prediction"] < high
    assert told["os"]["percentile"] == 50  # every risk stands between -50 and 50
    assert {p.name for p in (tmp_path / "out" / "c").iterdir()} == {"prediction.json"} | {
        f"{kind}-{task.name}{end}"
        for task in EACH
        for kind, end in (("attention", ".h5"), ("attention", ".geojson"), ("heatmap", ".jpg"))
    }


def test_a_percentile_is_taken_among_each_folds_own_risks():
    seen = {0: np.array([1.0, 2, 3, 4]), 1: np.array([100.0, 200])}
    from pathme_jax.mil.abstention import percentile

    assert percentile(np.array([2.0, 50]), seen) == 25  # half of fold 0's, none of fold 1's
    assert percentile(np.array([9.0, 500]), seen) == 100


def test_joined_parents_are_made_too(slides, new, tmp_path):
    fine, coarse = extracted(slides, tmp_path / "trained", (0.5, 2.0))
    made = bundle.make(
        make_run(tmp_path / "run", fine, parent=coarse), "mean_rgb", tmp_path / "bundle"
    )
    assert made.mpps == [0.5, 2.0]
    found = prediction.predict([new], made.folder, tmp_path / "out", **HOW)
    own, above = (
        read_features(f / "c.h5") for f in extracted(new.parent, tmp_path / "x", (0.5, 2))
    )
    joined = bags.with_parents(own, above)
    mean, _, _ = made.heads.predict(joined.features, joined.grid, "y")
    scores = found.slides["c"]["tasks"]["y"]["scores"]
    np.testing.assert_allclose(list(scores.values()), mean, atol=1e-6)


def test_what_is_done_under_the_same_bundle_is_not_done_again(made, new, tmp_path, monkeypatch):
    first = prediction.predict([new], made.folder, tmp_path / "out", **HOW)

    def refuse(*_, **__):
        raise AssertionError("computed again")

    with monkeypatch.context() as patched:
        patched.setattr(prediction, "_extract", refuse)
        again = prediction.predict([new], made.folder, tmp_path / "out", **HOW)
        assert again.slides == first.slides and again.done == 0
    other = bundle.make(tmp_path / "run", "mean_rgb", tmp_path / "other", accuracy=0.5)
    assert prediction.predict([new], other.folder, tmp_path / "out", **HOW).done == 1
    new.write_bytes(new.read_bytes() + b"0")  # another file under the same name
    assert prediction.predict([new], other.folder, tmp_path / "out", **HOW).done == 1


def test_bad_slides_are_told_at_the_end_and_stop_no_other(
    made, new, tmp_path, paint, write_tiff, capsys
):
    blank = write_tiff(tmp_path / "bad" / "blank.tiff", np.full((1100, 1100, 3), 243, np.uint8))
    unknown = write_tiff(tmp_path / "bad" / "unknown.tiff", paint(3), mpp=None)
    broken = tmp_path / "bad" / "broken.svs"
    broken.write_bytes(b"no slide")
    absent = tmp_path / "bad" / "absent.svs"
    out = tmp_path / "out"
    files = [*map(str, (blank, unknown, broken, absent, new))]
    flags = ["--bundle", str(made.folder), "--out", str(out), "--threshold", "0", "--workers", "0"]
    launcher.main([*files, *flags])
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if line.startswith("c: ")]
    assert " 0." in line or " 1." in line
    assert sum("Research use only" in line for line in said) == 1
    assert "y: learned from too few cases to judge" in said
    errors = {row["slide_id"]: row for row in read_csv(out / "errors.csv")}
    assert set(errors) == {"blank", "unknown", "broken", "absent"}
    assert "no tissue" in errors["blank"]["reason"]
    assert "µm/px" in errors["unknown"]["reason"] and "--mpp" in errors["unknown"]["cure"]
    assert "--mpp-csv" not in errors["unknown"]["cure"]
    for slide_id in errors:
        assert any(line.startswith(f"  {slide_id}: ") for line in said)
        assert not (out / slide_id).exists()
    # Nothing but bad ones left: the good one stands, and what --mpp cures is cured. A stated µm/px stays.
    found = prediction.predict(files, made.folder, out, mpp=0.51, threshold=0.0, **HOW)
    assert set(found.slides) == {"c", "unknown"} and found.done == 1
    assert found.slides["unknown"]["level0_mpp"] == 0.51
    assert found.slides["c"]["level0_mpp"] == pytest.approx(0.5)
    with pytest.raises(SystemExit) as end:
        launcher.main([str(broken), *flags])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: none of the 1 slides could be predicted; broken: ")


def test_wrong_arguments_are_one_line(made, new, tmp_path):
    def refused(words, slides=(new,), folder=made.folder, **more):
        with pytest.raises(UserError, match=words) as error:
            prediction.predict(slides, folder, tmp_path / "out", **more, **HOW)
        assert "\n" not in str(error.value)

    data = new.with_name("c") / "Data0000.dat"  # as of a .mrxs slide
    data.parent.mkdir()
    data.write_bytes(b"pixels")
    with pytest.raises(UserError, match="is there and is no prediction"):
        prediction.predict([new], made.folder, new.parent, **HOW)
    assert data.exists()
    refused("would both be c", slides=[new, tmp_path / "elsewhere" / "c.svs"])
    refused("--mpp 0: expected 0.05 to 20", mpp=0.0)
    refused("--threshold 2: expected 0 to 1", threshold=2.0)
    refused("not a bundle", folder=tmp_path)
    (made.folder / "heads" / "heads.npz").unlink()
    refused("heads.npz: no such file")
    assert not (tmp_path / "out").exists()


def test_help_needs_neither_jax_nor_numpy():
    for name in ("predict", "bundle"):
        code = (
            f"import sys, pathme_jax.{name} as m\n"
            "try: m.main(['--help'])\n"
            "except SystemExit: pass\n"
            "assert not {'jax', 'torch', 'tensorflow', 'numpy'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
