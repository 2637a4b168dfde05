"""A whole MIL run: its files, its rerun, its controls, and every bad input as one line."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from pathme_jax import mil_train
from pathme_jax.errors import UserError
from pathme_jax.evaluation.auroc import auroc
from pathme_jax.files import read_json
from pathme_jax.mil import crossval, saved
from pathme_jax.mil.bags import MilBag
from pathme_jax.mil.heads import make
from pathme_jax.mil.population import Population
from pathme_jax.mil.run import run
from pathme_jax.mil.tasks import Task, Tasks
from pathme_jax.records.features import coordinate_attrs, read_features, write_features

# One shape for nearly all tests, so that the step is compiled once a process.
QUICK = {"epochs": 12, "folds": 2, "learning_rate": 5e-3, "hidden": 16, "attention": 8}


def make_cohort(folder, cases=14, per_case=2, d=6, recipe="12345678", signal=5.0, classes=2):
    rng = np.random.default_rng(0)
    lines = ["case_id,slide_id,y"]
    colours = ["slide_id,r,g,b"]
    for i in range(cases * per_case):
        case, slide = i // per_case, f"s{i:02}"
        grid = np.argwhere(np.ones((5, 6)))[: 30 - i % 4]
        x = rng.normal(size=(len(grid), d)).astype(np.float32)
        x[:4, case % classes] += signal
        attrs = coordinate_attrs(slide_id=slide, mpp=0.5, slide_mpp=0.5, level0_size=(4096, 4096))
        write_features(
            folder / "features" / f"{slide}.h5",
            features=x,
            coords=grid[:, ::-1] * 256,
            grid=grid,
            attrs=attrs | {"encoder": "fake", "recipe": recipe},
        )
        lines.append(f"c{case},{slide},{'abc'[case % classes]}")
        colours.append(f"{slide},{rng.random()},{rng.random()},{rng.random()}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    (folder / "colour.csv").write_text("\n".join(colours) + "\n")
    return folder


def quick(folder, out="out", **more):
    found = run(folder / "features", folder / "labels.csv", "y", folder / out, **(QUICK | more))
    return found["y"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def found(cohort):
    return quick(cohort, colour=cohort / "colour.csv", name="20x")


def run_of(found):
    return Path(found["folder"]).parent


def rows_of(found, name):
    home = run_of(found) if name == "history.csv" else Path(found["folder"])
    with open(home / name, newline="") as file:
        return list(csv.DictReader(file))


def test_signal_is_found_and_controls_are_not(found):
    rows = found["rows"]
    assert rows["head"]["auroc"] > 0.9 and rows["mean_pool"]["auroc"] > 0.9
    assert rows["head"]["interval"][0] > 0.5
    for control in ("shuffled", "mean_colour"):
        low, high = rows[control]["interval"]
        assert low <= 0.5 <= high, (control, rows[control])
    assert found["too_few_to_judge"] and found["cases"] == 14
    assert found["cases_per_class"] == {"a": 7, "b": 7} and found["folds"] == 2


def test_every_slide_is_predicted_once_by_a_model_that_did_not_see_its_patient(found):
    predictions, cases = rows_of(found, "predictions.csv"), rows_of(found, "cases.csv")
    assert sorted(row["slide_id"] for row in predictions) == [f"s{i:02}" for i in range(28)]
    assert len(cases) == 14
    fold_of = {row["case_id"]: row["fold"] for row in cases}
    for row in predictions:
        assert row["fold"] == fold_of[row["case_id"]]
        assert abs(float(row["score_a"]) + float(row["score_b"]) - 1) < 1e-5
    one = [float(r["score_b"]) for r in predictions if r["case_id"] == "c3"]
    (mean,) = [float(r["score_b"]) for r in cases if r["case_id"] == "c3"]
    assert abs(np.mean(one) - mean) < 2e-6


def test_attention_lies_beside_its_coordinates(cohort, found):
    with (
        h5py.File(run_of(found) / "attention" / "s05.h5") as file,
        h5py.File(cohort / "features" / "s05.h5") as source,
    ):
        attention = np.asarray(file["attention"])
        np.testing.assert_array_equal(np.asarray(file["coords"]), np.asarray(source["coords"]))
        np.testing.assert_array_equal(np.asarray(file["grid"]), np.asarray(source["grid"]))
        assert file["coords"].attrs["patch_size_level0"] == 256
        assert set(file) == {"attention", "coords", "grid", "kind"}
    assert attention.shape == (29,) and abs(attention.sum() - 1) < 1e-4


def test_the_history_has_a_loss_per_epoch_and_fold(found):
    rows = rows_of(found, "history.csv")
    assert len(rows) == 2 * 12
    first, last = float(rows[0]["loss"]), float(rows[11]["loss"])
    assert last < first


def test_the_same_command_recomputes_nothing(cohort, found, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("recomputed")

    monkeypatch.setattr(crossval, "evaluate", refuse)
    assert quick(cohort, colour=cohort / "colour.csv", name="20x") == found


def test_another_recipe_goes_beside(tmp_path):
    make_cohort(tmp_path, cases=4, per_case=1)
    first = quick(tmp_path, epochs=1)
    seeded = quick(tmp_path, epochs=1, seed=1)
    make_cohort(tmp_path, cases=4, per_case=1, recipe="87654321")
    extracted = quick(tmp_path, epochs=1)
    (tmp_path / "labels.csv").write_text(
        "case_id,slide_id,y\nc0,s00,b\nc1,s01,b\nc2,s02,a\nc3,s03,a\n"
    )
    relabelled = quick(tmp_path, epochs=1)
    folders = {run_of(each) for each in (first, seeded, extracted, relabelled)}
    assert len(folders) == 4 and set((tmp_path / "out").iterdir()) == folders


def test_a_run_done_again_from_nothing_is_equal_to_the_byte(tmp_path):
    make_cohort(tmp_path, cases=6, per_case=1)
    first = quick(tmp_path, epochs=2)
    kept = {}
    for path in sorted(p for p in (tmp_path / "out").rglob("*") if p.suffix in (".json", ".csv")):
        if path.name != "run.json":
            kept[path] = path.read_bytes()
    assert len(kept) == 5
    shutil.rmtree(tmp_path / "out")
    assert quick(tmp_path, epochs=2) == first
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_run_that_died_leaves_nothing_that_looks_done(tmp_path, monkeypatch):
    make_cohort(tmp_path, cases=6, per_case=1)
    with monkeypatch.context() as broken:
        broken.setattr(crossval, "write_history", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quick(tmp_path, epochs=1)
    assert list((tmp_path / "out").iterdir()) == []
    assert quick(tmp_path, epochs=1)["cases"] == 6


def test_case_bags_and_three_classes(tmp_path):
    make_cohort(tmp_path, cases=9, classes=3)
    found = quick(tmp_path, bag="case", epochs=30)
    assert found["classes"] == ["a", "b", "c"]
    rows = rows_of(found, "predictions.csv")
    assert len(rows) == 9 and rows[0]["slide_id"].count(";") == 1
    assert found["rows"]["head"]["auroc"] > 0.8
    with h5py.File(run_of(found) / "attention" / "s00.h5") as file:
        assert 0 < np.asarray(file["attention"]).sum() < 1  # the case's sum to one


def test_the_users_folds_are_used_and_a_leak_is_refused(tmp_path):
    make_cohort(tmp_path, cases=6, per_case=2)
    rows = (tmp_path / "labels.csv").read_text().split()

    def split(test_of):
        lines = [rows[0] + ",fold_0,fold_1"]
        for i, row in enumerate(rows[1:]):
            lines.append(row + "".join(",test" if test_of(f, i) else ",train" for f in (0, 1)))
        (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")

    split(lambda f, i: (i // 2 < 3) == (f == 0))
    found = quick(tmp_path, epochs=1)
    assert found["folds"] == 2 and found["fold_source"] == "fold_0, fold_1"
    fold = {row["case_id"]: row["fold"] for row in rows_of(found, "cases.csv")}
    assert fold == {f"c{i}": str(int(i >= 3)) for i in range(6)}
    split(lambda f, i: i == 3)  # one of two slides of case c1
    with pytest.raises(UserError, match="patient 'c1' is in both"):
        quick(tmp_path)


def test_slides_left_out_are_listed_and_the_rest_is_judged(tmp_path):
    make_cohort(tmp_path, cases=6, per_case=1)
    (tmp_path / "features" / "s05.h5").unlink()
    shutil.copy(tmp_path / "features" / "s04.h5", tmp_path / "features" / "unlabelled.h5")
    with open(tmp_path / "labels.csv", "a") as file:
        file.write("c9,s09,\n")
    found = quick(tmp_path, epochs=1)
    assert [problem["slide_id"] for problem in found["problems"]] == ["s05"]
    assert found["no_label"] == ["unlabelled"] and found["blank_label"] == ["s09"]
    assert found["slides"] == 5 and found["folds"] == 2


def test_heads_that_vote_are_averaged_and_kept(tmp_path):
    """Three heads a fold: their mean is written, and each of them is kept for `predict`."""
    make_cohort(tmp_path, cases=8, per_case=1)
    found = quick(tmp_path, seeds=3, epochs=6)
    heads = saved.load(run_of(found) / "heads")
    assert (heads.about["folds"], heads.about["seeds"]) == (2, 3)
    slide = read_features(tmp_path / "features" / "s03.h5")
    answer = heads.answer(slide.features, slide.grid)
    (row,) = [row for row in rows_of(found, "predictions.csv") if row["slide_id"] == "s03"]
    fold = int(row["fold"])
    mean = heads.scores(answer, "y")[3 * fold : 3 * fold + 3].mean(0)
    assert mean[1] == pytest.approx(float(row["score_b"]), abs=1e-5)


def test_settings_are_chosen_by_each_fold_and_told(tmp_path):
    """A rate that learns and one that does not; the heads kept, their history and the scores are the learner's."""
    make_cohort(tmp_path, cases=12, per_case=1)
    rows = (tmp_path / "labels.csv").read_text().split()
    parts = ["test", "test", "val", "val"] + ["train"] * 8
    both = zip(parts, parts[::-1], strict=True)
    lines = [",".join([row, *each]) for row, each in zip(rows[1:], both, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join([rows[0] + ",fold_2,fold_5", *lines]) + "\n")
    found = quick(tmp_path, sweep="learning_rate=1e-7:5e-3", seeds=2)
    assert found["chosen"] == [{"learning_rate": 5e-3, "weight_decay": 1e-2}] * 2
    assert found["fold_names"] == ["fold_2", "fold_5"]
    with open(run_of(found) / "sweep.csv", newline="") as file:
        told = list(csv.DictReader(file))
    assert [row["chosen"] for row in told] == ["0", "1"] * 2
    assert float(told[0]["validation_loss"]) > float(told[1]["validation_loss"])
    plain = quick(tmp_path, seeds=2)
    assert plain["rows"]["shuffled"]["cases"] == found["rows"]["shuffled"]["cases"] == 4
    for name in ("history.csv", "cases.csv"):
        for one, other in zip(rows_of(found, name), rows_of(plain, name), strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() - {"case_id", "fold", "label", "epoch"}:
                assert float(one[key]) == pytest.approx(float(other[key]), abs=2e-3)
    with pytest.raises(UserError, match="fold 0 has no validation part to choose by"):
        quick(tmp_path, sweep="weight_decay=0:1", fold_column_prefix="")


def test_the_history_is_of_the_folds_and_not_of_the_controls(tmp_path, monkeypatch):
    """The first seed of every fold, in their order."""
    make_cohort(tmp_path, cases=8, per_case=1)
    fitted = {}
    fit = crossval.fit_plan

    def kept(*args):
        fitted["history"] = (found := fit(*args))[0].history
        return found

    monkeypatch.setattr(crossval, "fit_plan", kept)
    found = quick(tmp_path, seeds=2, epochs=3)
    written = [float(row["loss"]) for row in rows_of(found, "history.csv")]
    assert len(fitted["history"]) == 2 * 2 * 2  # folds, seeds, and as many for the control
    np.testing.assert_allclose(written, fitted["history"][[0, 2], :, 0].ravel(), atol=1e-6)


def test_bags_cut_in_training_are_whole_when_they_are_judged(tmp_path):
    make_cohort(tmp_path, cases=6, per_case=1)
    found = quick(tmp_path, epochs=1, max_instances=8)
    with h5py.File(run_of(found) / "attention" / "s01.h5") as file:
        attention = np.asarray(file["attention"])
    assert attention.shape == (29,) and (attention > 0).all()


def test_blanks_of_labels_are_neither_learned_nor_judged(tmp_path):
    """What a blank would be read as, by either label, is planted where it would show."""
    make_cohort(tmp_path, cases=16, per_case=1)
    lines = ["case_id,slide_id,er,pr"]
    for i in range(16):
        lines.append(f"c{i},s{i:02},{i % 2},{'' if i % 4 < 2 else i % 2}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    args = (tmp_path / "features", tmp_path / "labels.csv", "labels:er+pr", tmp_path / "out")
    found = run(*args, **(QUICK | {"epochs": 2}))["er+pr"]
    assert found["cases_per_class"] == {"er": 8, "pr": 4}
    blank = [row["case_id"] for row in rows_of(found, "cases.csv") if row["label_pr"] == ""]
    assert len(blank) == 8
    said = rows_of(found, "cases.csv")
    known = [row for row in said if row["label_pr"] != ""]
    expected = {}
    for name, rows in (("er", said), ("pr", known)):
        folds = np.array([int(row["fold"]) for row in rows])
        of = np.array([int(row[f"label_{name}"]) for row in rows])
        score = np.array([float(row[f"score_{name}"]) for row in rows])
        expected[name] = auroc(np.stack([-score, score], 1), of, folds)
    assert found["rows"]["head"]["labels"] == pytest.approx(expected, abs=1e-4)


def test_attention_of_a_class_is_shown_only_by_heads_that_have_one_a_class():
    """Two heads of ABMIL are not two classes'."""
    tasks = Tasks((Task("os", "cox"), Task("y", "classes", ("a", "b"))))
    rows, logits = np.array([[1.0, 0], [0, 0], [0, 1]]), np.array([5.0, 0, 1])
    for name, expected in (("clam_mb", [0, 1]), ("dsmil", [0, 1]), ("abmil", [1 / 3, 1 / 3])):
        head = make(name, 3, dict(hidden=4, attention=4))
        fitted = Population(head, tasks, {}, np.zeros(0), np.zeros(0), np.zeros(0))
        np.testing.assert_allclose(crossval.shown_attention(fitted, rows, logits), expected)


def test_tasks_learned_together_and_slides_that_know_only_some(tmp_path):
    """A class, two labels, a number and a time to event, all told by the same instances; each blank somewhere."""
    make_cohort(tmp_path, cases=40, per_case=1)
    rng = np.random.default_rng(0)
    lines = ["case_id,slide_id,y,er,pr,hrd,os_months,os_event"]
    for i in range(40):
        other, months = rng.integers(2), rng.exponential(30 if i % 2 else 3) + 0.1
        values = ["ab"[i % 2], i % 2, other, i % 2 + 0.1 * rng.normal(), round(months, 2), 1]
        values[i % 4] = "" if i % 7 == 0 and i % 4 < 4 else values[i % 4]
        lines.append(",".join(map(str, [f"c{i}", f"s{i:02}", *values])))
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    specs = "y,labels:er+pr,number:hrd,cox:os"
    args = (tmp_path / "features", tmp_path / "labels.csv", specs, tmp_path / "out")
    found = run(*args, **(QUICK | dict(batch=8, epochs=25)))
    assert set(found) == {"y", "er+pr", "hrd", "os"}
    head = {task: each["rows"]["head"] for task, each in found.items()}
    assert head["y"]["auroc"] > 0.9 and head["hrd"]["pearson"] > 0.8 and head["os"]["c_index"] > 0.6
    assert head["er+pr"]["labels"]["er"] > 0.9 and 0.2 < head["er+pr"]["labels"]["pr"] < 0.8
    assert found["y"]["cases"] < 40 and found["hrd"]["cases"] < 40
    assert len(rows_of(found["hrd"], "predictions.csv")) == found["hrd"]["cases"]
    truth = [float(row["truth"]) for row in rows_of(found["hrd"], "cases.csv")]
    said = [float(row["prediction"]) for row in rows_of(found["hrd"], "cases.csv")]
    assert np.mean(np.abs(np.subtract(truth, said))) < 0.4  # in its own units
    for each in found.values():
        low, high = each["rows"]["shuffled"]["interval"]
        assert low < (0 if each["measure"] == "pearson" else 0.5) + 0.15 or high < 0.9


def test_a_case_knows_what_one_of_its_slides_knows():
    bags = [MilBag(case, i, []) for i, case in enumerate(["p", "p", "q"])]
    truth = np.array([[[1.0], [np.nan], [0.0]]])
    for order in ([0, 1, 2], [1, 0, 2]):
        pairs = np.array([[0, bag] for bag in order])
        scores = np.array([0.2, 0.6, 0.9])[order][:, None]
        found = crossval.by_case(pairs, scores, truth, bags)
        assert found.cases.tolist() == ["p", "q"] and found.truth[:, 0].tolist() == [1, 0]
        np.testing.assert_allclose(found.scores[:, 0], [0.2, 0.9])  # by what is judged


def test_features_that_do_not_fit_are_read_again_and_change_nothing(tmp_path):
    make_cohort(tmp_path, cases=8, per_case=2)
    kept = quick(tmp_path, epochs=3, bag="case")
    again = quick(tmp_path, "small", epochs=3, bag="case", host_gb=1e-9, device_gb=1e-9)
    assert again["rows"] == kept["rows"]
    assert rows_of(again, "predictions.csv") == rows_of(kept, "predictions.csv")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("grades:y", "unknown kind 'grades'"),
        ("y,y", "two tasks called 'y'"),
        ("a/b", "'a/b' cannot be the name"),
        ("heads", "'heads' cannot be the name"),
    ],
)
def test_a_task_that_is_not_understood_is_named(tmp_path, task, said):
    make_cohort(tmp_path, cases=3, per_case=1)
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text(
        text.replace(",y\n", ",y,a/b,heads\n")
        .replace(",a\n", ",a,0,0\n")
        .replace(",b\n", ",b,1,1\n")
    )
    with pytest.raises(UserError, match=said):
        run(tmp_path / "features", tmp_path / "labels.csv", task, tmp_path / "out")


def test_no_signal_is_near_one_half_on_average(tmp_path):
    """Pooled leave-out scores of noise fall below one half; the primary measure must not."""
    make_cohort(tmp_path, cases=24, per_case=1, signal=0.0)
    values = []
    for seed in range(4):
        rows = quick(tmp_path, seed=seed, epochs=4)["rows"]
        values += [rows["shuffled"]["auroc"], rows["head"]["auroc"]]
    assert 0.35 < np.mean(values) < 0.65


@pytest.mark.parametrize(
    "labels, words",
    [
        ("case_id,slide_id,other\nc0,s00,1\n", ["no column 'y'", "other"]),
        ("case_id,slide_id,y\nc0,s00,a\nc1,s01,a\n", ["only one class", "'a'"]),
        ("case_id,slide_id,y\nc0,s00,a\nc1,s01,a\nc2,s02,b\n", ["'b'", "cannot cross-validate"]),
        ("case_id,slide_id,y\nc0,s00,a\nc0,s00,a\n", ["'s00'", "more than one row"]),
    ],
)
def test_bad_labels_end_with_one_line_and_code_2(tmp_path, capsys, labels, words):
    make_cohort(tmp_path, cases=3, per_case=1)
    (tmp_path / "labels.csv").write_text(labels)
    flags = ["--features", tmp_path / "features", "--labels", tmp_path / "labels.csv"]
    with pytest.raises(SystemExit) as end:
        mil_train.main([*map(str, flags), "--task", "y", "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.json"))


def test_the_launcher_runs_and_says_where(tmp_path, capsys):
    make_cohort(tmp_path, cases=4, per_case=1)
    flags = ["--features", tmp_path / "features", "--labels", tmp_path / "labels.csv"]
    mil_train.main(
        [*map(str, flags), "--task", "y", "--out", str(tmp_path / "out"), "--epochs", "1"]
    )
    said = capsys.readouterr().out
    assert "4 cases: too few to judge" in said
    folder = said.strip().splitlines()[-1]
    assert read_json(f"{folder}/run.json")["recipe"]["settings"]["epochs"] == 1


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path, capsys):
    make_cohort(tmp_path, cases=6, per_case=2)
    flags = ["--features", tmp_path / "features", "--labels", tmp_path / "labels.csv"]
    flags += ["--task", "y", "--out", tmp_path / "out", "--seeds", "2", "--folds", "3"]
    mil_train.main([*map(str, flags), "--dry-run"])
    said = capsys.readouterr().out
    assert "12 slides of 6 patients" in said and "{'a': 3, 'b': 3}" in said
    assert "3 folds (stratified by case), x 2 seeds, and 1 controls: 12 heads, abmil" in said
    assert "kept on the device" in said and not (tmp_path / "out").exists()
    mil_train.main([*map(str, flags), "--dry-run", "--device-gb", "1e-9"])
    assert "streamed to the device" in capsys.readouterr().out


def test_help_needs_neither_jax_nor_numpy():
    code = (
        "import sys, pathme_jax.mil_train as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'torch', 'tensorflow', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
