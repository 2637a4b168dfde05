"""The probe of a run: the same tissue tiles every time, cases or fields kept apart, in batches of one shape."""

import csv
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from pathme_jax.encoders.descriptors import mean_rgb
from pathme_jax.errors import UserError
from pathme_jax.records import fields
from pathme_jax.training import probe as module
from pathme_jax.training.probe import Probe, _tissue_windows


@pytest.fixture
def settings(grid_dir: Path, cohort: Path) -> ConfigDict:
    return ConfigDict(
        {
            "every": 2,
            "path": str(grid_dir),
            "labels": str(cohort / "labels.csv"),
            "column": "detail",
            "tiles": 6,
            "px": 256,
            "multiple": 1,
            "split": "case",
            "folds": 2,
        }
    )


def test_values_are_those_of_the_features_whatever_the_batch(settings, monkeypatch):
    """Mean colour given as the encoder scores as the mean colour beside it; padding changes nothing."""
    shapes = set()

    def encode(product, batch):
        shapes.add((batch["image"].shape, batch["image"].dtype.name))
        return product * mean_rgb(batch["image"])

    probe = Probe(settings)
    assert len(probe.images) == 24
    values, beside = probe.scores(probe.features(encode, 1.0)), probe.baselines()
    assert set(values) == {
        f"probe/detail/{name}"
        for name in ("knn_accuracy", "knn_auroc", "linear_accuracy", "linear_auroc", "chance")
    }
    monkeypatch.setattr(module, "BATCH", 7)
    assert probe.scores(probe.features(encode, 1.0)) == pytest.approx(values)
    assert {f"probe/detail/mean_rgb/{k.split('/')[-1]}": v for k, v in values.items()} == beside
    assert shapes == {((64, 256, 256, 3), "uint8"), ((7, 256, 256, 3), "uint8")}


def test_an_encoder_that_knows_the_answer_scores_one(settings):
    probe = Probe(settings)
    answer = dict(zip((x.tobytes() for x in probe.images), probe.labels, strict=True))

    def encode(product, batch):
        known = [float(answer.get(x.tobytes(), 0)) for x in batch["image"]]
        return np.array([[1 - a, a] for a in known], np.float32)

    values = probe.scores(probe.features(encode, None))
    assert values.pop("probe/detail/chance") == 0.5
    assert set(values.values()) == {1.0}


def test_the_tiles_are_the_same_every_time_and_spread_over_fields(settings):
    first, second = Probe(settings), Probe(settings)
    assert (first.images == second.images).all() and (first.groups == second.groups).all()
    settings.split = "tile"
    by_tile = Probe(settings)
    assert by_tile.name == "probe/detail_by_tile"
    assert (by_tile.images == first.images).all()
    assert len(set(by_tile.groups)) == 24  # as many fields as tiles
    assert len(set(first.groups)) == 4  # cases


def test_tiles_are_tissue_cut_from_the_fields(settings):
    settings.split = "tile"
    source = fields.FieldSource(settings.path)
    probe = Probe(settings)
    for field, image in zip(probe.groups, probe.images, strict=True):
        record = source[int(field)]
        whole = fields.decode(record["image"])
        cells = [whole[y : y + 256, x : x + 256] for y, x in 256 * np.argwhere(record["tissue"])]
        assert any((cell == image).all() for cell in cells)


def test_coarser_tiles_are_area_averaged(settings):
    settings.update(split="tile", multiple=4, tiles=2)
    source = fields.FieldSource(settings.path)
    probe = Probe(settings)
    for field, image in zip(probe.groups, probe.images, strict=True):
        whole = fields.decode(source[int(field)]["image"])
        assert (image == fields.area_average(whole, 4)).all()


def test_more_tiles_than_fields_come_from_as_few_of_each_as_possible(settings):
    settings.update(split="tile", tiles=40)
    probe = Probe(settings)
    _, counts = np.unique(probe.groups, return_counts=True)
    assert counts.max() == 3  # 16 fields a slide
    assert len({image.tobytes() for image in probe.images}) == len(probe.images)


def test_windows_are_those_at_least_half_tissue():
    tissue = np.zeros((4, 4), bool)
    tissue[0, :3] = tissue[1, 0] = True
    assert _tissue_windows(tissue, 1024, 256).tolist() == [[0, 0], [0, 256], [0, 512], [256, 0]]
    assert _tissue_windows(tissue, 1024, 512).tolist() == [[0, 0]]
    assert _tissue_windows(tissue, 1024, 1024).tolist() == []
    assert len(_tissue_windows(np.ones((4, 4), bool), 1024, 224)) == 16


def test_slides_without_a_label_are_left_out(settings, tmp_path):
    with open(settings.labels) as file:
        rows = list(csv.DictReader(file))
    rows[0]["detail"] = ""
    settings.labels = str(tmp_path / "labels.csv")
    with open(settings.labels, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    probe = Probe(settings)
    assert len(probe.images) == 18
    assert set(probe.groups) == {row["case_id"] for row in rows[1:]}


def test_settings_that_do_not_fit_are_named(settings, tmp_path):
    (tmp_path / "other.csv").write_text("case_id,slide_id,detail\na,b,0\nc,d,1\n")
    for change, message in (
        ({"split": "slide"}, "config.probe.split = 'slide'"),
        ({"multiple": 8}, "tiles of 256 x 8 px, fields of 1024 px"),
        ({"labels": str(tmp_path / "other.csv")}, "no slide of .* has a 'detail'"),
        ({"column": "organ"}, "no column 'organ'"),
        ({"path": str(tmp_path)}, "no slides.csv"),
    ):
        with pytest.raises(UserError, match=message):
            Probe(ConfigDict({**settings.to_dict(), **change}))


def test_too_few_cases_to_keep_apart_is_an_error_not_a_number(settings):
    settings.folds = 5
    with pytest.raises(UserError, match="fewer than the 5 folds"):
        Probe(settings).baselines()
