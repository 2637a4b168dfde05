"""Bundles: when to abstain, what is refused, what travels and what does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import dinov2_tiny
from pathme_jax import bundle as launcher
from pathme_jax.encoders import encoder, exporting, patch
from pathme_jax.encoders.zoo import Definition, Input
from pathme_jax.errors import UserError
from pathme_jax.files import read_json, write_csv, write_json
from pathme_jax.mil import abstention, bundle, population, saved
from pathme_jax.mil.heads import make
from pathme_jax.mil.heads.common import Bag
from pathme_jax.mil.tasks import Task, Tasks
from pathme_jax.slides.plan import Recipe
from pathme_jax.training import checkpoints, workdir
from pathme_jax.training.contract import load_method

SIZES = {"hidden": 8, "attention": 4, "dropout": 0.0}
CLASSES = Task("y", "classes", ("a", "b"))
LABELS = Task("er+pr", "labels", ("er", "pr"))
NUMBER = Task("hrd", "number")
RISK = Task("os", "nll", bins=3)
TILING = json.loads(json.dumps(Recipe(tile_px=32, field_px=128).content()))
FACTS = {
    **{"encoder": "mean_rgb", "mpp": 0.5, "patch_size": 32, "width": 3, "dtype": "float32"},
    **{"tokens": False, "made_from": [], "tiling": TILING, "slides": 4, "identity": "1"},
    "parent": None,
}
# Confidence .95 .9 .8 .7 .6, right but for that of .8: from .7 on 3 of 4, from .6 on 4 of 5.
SCORES = {"p1": ("a", 0.95), "p2": ("b", 0.1), "p3": ("b", 0.8), "p4": ("a", 0.7), "p5": ("b", 0.4)}


def rows_of(task: Task) -> list[dict]:
    cases = [{"case_id": case, "fold": i % 2} for i, case in enumerate(SCORES)]
    if task is CLASSES:
        more = [{"label": y, "score_a": p, "score_b": 1 - p} for y, p in SCORES.values()]
    elif task is LABELS:
        pr = [1, "", 0, 1, 1]  # of one nothing is known
        more = [
            {"label_er": int(y == "a"), "score_er": p, "label_pr": known, "score_pr": 0.4}
            for (y, p), known in zip(SCORES.values(), pr, strict=True)
        ]
    elif task is NUMBER:
        more = [{"truth": 10, "prediction": 10 + i} for i in range(5)]
    else:
        more = [{"time_months": 5, "event": 1, "risk": i} for i in range(5)]
    return [case | row for case, row in zip(cases, more, strict=True)]


def make_run(folder: Path, tasks=(CLASSES,), **facts) -> Path:
    module = make("abmil", Tasks(tasks).outputs, SIZES)
    facts = FACTS | facts
    zeros = np.zeros((1, facts["width"])), np.ones(1, bool), np.zeros((1, 2), int)
    one = module.init(jax.random.key(0), Bag(*map(jax.numpy.asarray, zeros)))["params"]
    params = jax.tree.map(lambda x: np.stack([x, x + 0.1]), one)
    none = np.zeros((2, 0))
    fitted = population.Population(module, Tasks(tasks), params, none, none, none)
    how = dict(head="abmil", options="", sizes=SIZES, tasks=Tasks(tasks), folds=2, seeds=1)
    saved.save(folder / "heads", fitted, **how, features=facts, scales={"hrd": [[0, 1]] * 2})
    for task in tasks:
        rows = rows_of(task)
        write_csv(folder / task.name / "cases.csv", rows, list(rows[0]))
        head = {"auroc": 0.8, "interval": [0.6, 0.9], "fold_auroc": [0.8, 0.8]}
        facts = {"measure": "auroc", "cases": 5, "cases_per_class": {"a": 2, "b": 3}}
        told = {"rows": {"head": head}, "too_few_to_judge": True, "bag": "slide"}
        write_json(folder / task.name / "metrics.json", facts | told | {"no_label": ["s9"]})
    return folder


def small_vit(folder: Path, seed: int = 0, **terms) -> Path:
    model = dict(patch=16, width=48, depth=1, heads=3, layer_scale=1.0, grid=2, registers=0)
    more = {"licence": "MIT", "source": "here"} | terms
    how = Definition("small", model, Input(resize=32, crop=32), positions="patches", **more)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), patch.abstract(how)
    )
    encoder.save(folder, how, params, made_from=[])
    return folder


@pytest.mark.parametrize(
    "accuracy, threshold, right, kept",
    [(1.0, 0.9, 1.0, 0.4), (0.8, 0.6, 0.8, 1.0), (0.7, 0.6, 0.8, 1.0), (0.9, 0.9, 1.0, 0.4)],
)
def test_the_threshold_of_a_table_done_by_hand(accuracy, threshold, right, kept):
    found = bundle.rule_of(CLASSES, [{k: str(v) for k, v in r.items()} for r in rows_of(CLASSES)], accuracy)  # fmt: skip
    told = (found["threshold"], found["right"], found["kept"])
    assert told == pytest.approx((threshold, right, kept))
    assert found["cases"] == 5 and found["accuracy"] == accuracy


def test_equal_confidences_stand_or_fall_together_and_no_threshold_may_be_found():
    found = abstention.least_confidence(
        np.array([0.9, 0.9, 0.5]), np.array([True, False, True]), 0.9
    )
    assert found["threshold"] is None and found["right"] is None
    found = abstention.least_confidence(
        np.array([0.9, 0.9, 0.5]), np.array([True, False, True]), 0.5
    )
    assert found["threshold"] == 0.5 and found["right"] == pytest.approx(2 / 3)


def test_wilsons_bound_and_the_conformal_radius_are_the_textbooks():
    # Wilson 1927: 9 of 10 → 0.596; none of 10 → 0; 10 of 10 → n / (n + z²)
    assert abstention.wilson_low(9, 10) == pytest.approx(0.5958, abs=1e-4)
    assert abstention.wilson_low(10, 10) == pytest.approx(10 / (10 + 1.959964**2))
    assert abstention.wilson_low(0, 10) == pytest.approx(0, abs=1e-12)
    residuals = np.array([3.0, -1, 2, -5, 4, 6, -7, 8, 9])
    assert abstention.conformal_radius(residuals, 0.9) == 9  # the ninth of nine
    assert abstention.conformal_radius(residuals, 0.5) == 5
    assert abstention.conformal_radius(residuals[:8], 0.9) is None


def test_intervals_hold_what_they_promise():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        radius = abstention.conformal_radius(rng.normal(size=30), 0.9)
        assert radius is not None
        held.append(np.mean(np.abs(rng.normal(size=200)) <= radius))
    assert 0.89 < np.mean(held) < 0.93


def test_a_case_that_two_folds_tested_counts_once():
    rows = [
        {"case_id": "p", "fold": "0", "label": "a", "score_a": "0.9", "score_b": "0.1"},
        {"case_id": "p", "fold": "1", "label": "a", "score_a": "0.5", "score_b": "0.5"},
    ]
    found = bundle.rule_of(CLASSES, rows, 0.9)
    assert found["cases"] == 1 and found["threshold"] == pytest.approx(0.7)


def test_every_kind_of_task_has_its_rule(tmp_path):
    run = make_run(tmp_path / "run", (CLASSES, LABELS, NUMBER, RISK))
    made = bundle.make(run, "mean_rgb", tmp_path / "bundle", accuracy=0.75)
    rules = {name: task["rule"] for name, task in made.about["tasks"].items()}
    assert rules["y"]["threshold"] == 0.6 and rules["er+pr"]["er"]["threshold"] == 0.6
    assert rules["er+pr"]["pr"]["cases"] == 4 and rules["er+pr"]["pr"]["threshold"] is None
    assert rules["hrd"] == {"interval": None, "level": 0.9, "cases": 5}
    assert made.about["tasks"]["os"]["kind"] == "nll" and rules["os"] == {"cases": 5}


def test_a_bundle_says_what_it_is_and_names_no_patient(tmp_path):
    vit = small_vit(tmp_path / "vit", licence="CC-BY-NC-4.0", terms="ask first")
    name = encoder.load(vit).name
    run = make_run(tmp_path / "run", encoder=name, width=48)
    made = bundle.make(run, vit, tmp_path / "bundle")
    about = read_json(tmp_path / "bundle" / "bundle.json")
    assert about == made.about and about["use"].startswith("Research use only")
    assert about["encoder"]["licence"] == "CC-BY-NC-4.0" and about["encoder"]["warnings"]
    task = about["tasks"]["y"]
    assert task["cases_per_class"] == {"a": 2, "b": 3} and task["too_few_to_judge"]
    assert task["measures"] == {"auroc": 0.8, "interval": [0.6, 0.9]}
    assert "jax" in about["versions"]
    shutil.rmtree(run)
    shutil.rmtree(vit)  # it stands alone
    again = bundle.load(tmp_path / "bundle")
    assert encoder.load(again.encoder).name == name
    assert [row["label"] for row in again.rows["y"]] == ["a", "b", "b", "a", "b"]
    assert again.recipe == Recipe(tile_px=32, field_px=128) and again.mpps == [0.5]
    texts = [
        p.read_text() for p in (tmp_path / "bundle").rglob("*") if p.suffix in (".json", ".csv")
    ]
    assert len(texts) == 4 and not any("p1" in t or "s9" in t or str(tmp_path) in t for t in texts)


def test_an_encoder_trained_here_or_exported_goes_along_under_its_name(tmp_path):
    """Of a run its product alone, without where it was trained: the copy is the encoder, to the bit."""
    config = dinov2_tiny.get_config("test")
    method = load_method(config)
    shapes, _ = jax.eval_shape(lambda: method.init(jax.random.key(0), None))
    rng = np.random.default_rng(0)
    product = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), method.product(shapes)
    )
    trained = tmp_path / "trained"
    what = workdir.identity(config, "Source(fields)", {})
    about = {"config": json.loads(config.to_json()), "identity": what, "made_from": []}
    about["config"]["data"]["path"] = str(tmp_path)
    write_json(trained / "config.json", about | {"provenance": {"command": [str(tmp_path)]}})
    checkpoints.write_product(trained, "run", product, step=1, identity=what)
    model = encoder.load(trained)
    images = rng.integers(0, 256, (1, 32, 32, 3), np.uint8)
    expected = np.asarray(model(images))
    run = make_run(tmp_path / "run", encoder=model.name, width=expected.shape[1])
    made = bundle.make(run, trained, tmp_path / "bundle")
    copy = encoder.load(made.encoder)
    assert copy.name == model.name == made.about["encoder"]["name"]
    np.testing.assert_array_equal(np.asarray(copy(images)), expected)
    for name in ("config.json", "product.json"):
        text = (tmp_path / "bundle" / "encoder" / name).read_text()
        assert str(tmp_path) not in text and "command" not in text

    exporting.export(small_vit(tmp_path / "vit"), tmp_path / "exported", formats=["flax"])
    name = encoder.load(tmp_path / "exported" / "flax").name
    run = make_run(tmp_path / "other", encoder=name, width=48)
    assert bundle.make(run, tmp_path / "exported", tmp_path / "b").about["encoder"]["name"] == name


def test_another_encoder_is_refused_and_nothing_is_left(tmp_path):
    vit, other = small_vit(tmp_path / "vit"), small_vit(tmp_path / "other", seed=1)
    run = make_run(tmp_path / "run", encoder=encoder.load(vit).name, width=48)
    for wrong in (other, "mean_rgb"):
        with pytest.raises(UserError, match="were trained on features of small-"):
            bundle.make(run, wrong, tmp_path / "bundle")
    with pytest.raises(UserError, match="no finished training run"):
        bundle.make(run, tmp_path / "run", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"encoder": None}, "do not say their encoder"),
        ({"tokens": True}, "region tokens"),
        ({"mpp": None}, "do not say .*mpp"),
        ({"tiling": None}, "lay apart from the recipe.json"),
        ({"tiling": TILING | {"source": "images"}}, "were patches of images"),
        ({"tiling": TILING | {"schema": "old"}}, "another version"),
        ({"parent": FACTS | {"mpp": 2.0, "encoder": "hed_texture"}}, "parents' .* another encoder"),
        ({"parent": FACTS | {"mpp": 2.0, "tokens": True}}, "region tokens"),
    ],
)
def test_features_that_no_new_slide_could_be_given_are_refused(tmp_path, facts, words):
    run = make_run(tmp_path / "run", **facts)
    with pytest.raises(UserError, match=words) as error:
        bundle.make(run, "mean_rgb", tmp_path / "bundle")
    assert "\n" not in str(error.value) and not (tmp_path / "bundle").exists()


def test_what_is_no_run_or_no_bundle_is_refused(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="is no bundle"):
        bundle.make(run, "mean_rgb", tmp_path / "full")
    with pytest.raises(UserError, match="--accuracy 2"):
        bundle.make(run, "mean_rgb", tmp_path / "bundle", accuracy=2)
    write_csv(run / "y" / "cases.csv", [{"case_id": "p", "fold": 0}], ["case_id", "fold"])
    with pytest.raises(UserError, match=r"cases.csv: no label, score_a, score_b"):
        bundle.make(run, "mean_rgb", tmp_path / "bundle")
    (run / "y" / "cases.csv").unlink()
    with pytest.raises(UserError, match="no out-of-fold predictions"):
        bundle.make(run, "mean_rgb", tmp_path / "bundle")
    with pytest.raises(UserError, match="no heads here"):
        bundle.make(tmp_path / "full", "mean_rgb", tmp_path / "bundle")


def test_a_damaged_bundle_is_refused(tmp_path):
    folder = bundle.make(make_run(tmp_path / "run"), "mean_rgb", tmp_path / "bundle").folder
    about = read_json(folder / "bundle.json")
    easier = json.loads(json.dumps(about))
    easier["tasks"]["y"]["rule"]["threshold"] = 0.1
    for content, words in (
        (easier, "its parts are not those"),
        (about | {"version": 9}, "version 9"),
    ):
        write_json(folder / "bundle.json", content)
        with pytest.raises(UserError, match=words):
            bundle.load(folder)
    write_json(folder / "bundle.json", about)
    table = folder / "out_of_fold" / "y.csv"
    kept = table.read_text()
    table.write_text(kept.replace("0.95", "0.94"))
    with pytest.raises(UserError, match="its parts are not those"):
        bundle.load(folder)
    table.unlink()
    with pytest.raises(UserError, match="incomplete"):
        bundle.load(folder)
    table.write_text(kept)
    bundle.load(folder)
    (folder / "bundle.json").unlink()
    with pytest.raises(UserError, match="not a bundle"):
        bundle.load(folder)


def test_a_bundle_made_again_is_the_same_and_another_accuracy_is_another(tmp_path):
    run = make_run(tmp_path / "run")
    first, again = (bundle.make(run, "mean_rgb", tmp_path / "b").about["hash"] for _ in range(2))
    assert first == again
    assert bundle.make(run, "mean_rgb", tmp_path / "b", accuracy=0.7).about["hash"] != first


def test_the_launcher_says_what_to_expect(tmp_path, capsys):
    run = make_run(tmp_path / "run", (CLASSES, RISK))
    launcher.main(["--run", str(run), "--encoder", "mean_rgb", "--out", str(tmp_path / "b")])
    said = capsys.readouterr().out
    assert "y: abstains below 0.9; of the 40% of 5 cases at or above, 100% are right" in said
    assert "y: 5 cases are too few to judge" in said and "Research use only" in said
    with pytest.raises(SystemExit) as end:
        launcher.main(["--run", str(run), "--encoder", "hed_texture", "--out", str(tmp_path / "c")])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: hed_texture is hed_texture, the heads were trained on")
