"""The report: one file with nothing outside it, that says what a reader must know."""

import json
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from pathme_jax.files import write_csv, write_json
from pathme_jax.mil.bags import MilBag
from pathme_jax.mil.outputs import write_attention
from pathme_jax.records.features import Bag
from pathme_jax.reports import figures, words
from pathme_jax.reports.page import Report, write


def row(auroc, low, high):
    return {"auroc": auroc, "interval": [low, high], "balanced_accuracy": 0.5}


def make_run(folder, auroc=0.9, low=0.8, few=False, slides=6, **rows):
    """The files of a MIL run that the report reads."""
    (folder / "attention").mkdir(parents=True)
    metrics = {
        "task": "y", "classes": ["neg", "pos"], "cases": slides, "folds": 3,
        "cases_per_class": {"neg": slides // 2, "pos": slides // 2},
        "fold_source": "stratified by case", "too_few_to_judge": few,
        "problems": [{"slide_id": "lost", "reason": "no <features>", "cure": "Extract it"}],
        "rows": {
            "head": row(auroc, low, 1.0), "mean_pool": row(0.7, 0.5, 0.8),
            "shuffled": row(0.5, 0.3, 0.7), **rows,
        },
    }  # fmt: skip
    write_json(folder / "metrics.json", metrics)
    rng = np.random.default_rng(0)
    table = [
        {"case_id": f"c{i}", "slide_id": f"s{i}", "fold": i % 3, "label": ["neg", "pos"][i % 2]}
        | {"score_neg": round(1 - score, 3), "score_pos": round(score, 3)}
        for i, score in enumerate(rng.random(slides))
    ]
    for name in ("cases.csv", "predictions.csv"):
        write_csv(folder / name, table, list(table[0]))
    attrs = {"patch_size_level0": 256, "level0_width": 1024, "level0_height": 2048}
    for i in range(slides):
        coords = np.array([[0, 0], [256, 0], [0, 0]])
        bag = Bag(f"s{i}", np.zeros((3, 1)), coords, None, np.array([0, 0, 1], np.uint8), attrs)
        write_attention(
            folder, [MilBag(f"c{i}", 0, i, [bag])], np.array([[0, 0]]), [np.array([0.1, 0.2, 0.7])]
        )
    return folder


@pytest.fixture
def report(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(14):
        cv2.imwrite(str(pictures / f"s{i}.jpg"), np.full((900, 450, 3), 200 - i, np.uint8))
    log = tmp_path / "metrics.jsonl"
    lines = [
        {"step": s, "loss": 5 - s, "loss/koleo": 0.1, "teacher_entropy": 2.0, "grad_norm": 1.0}
        for s in range(4)
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Report(
        title="A <title>",
        results={
            "y": {
                "20x only": make_run(tmp_path / "a", auroc=0.6, low=0.4),
                "PatHME": make_run(tmp_path / "b", mean_colour=row(0.8, 0.6, 0.9)),
            }
        },
        slides=[{"slide_id": f"s{i}", "state": "done"} for i in range(14)],
        overviews=pictures,
        thumbnails=pictures,
        errors=[{"slide_id": "bad", "reason": "no mpp", "cure": "Pass --mpp-csv"}],
        training={"Patch encoder": log},
        recipe={"mpp": 0.5},
        versions={"jax": "0.0"},
    )


class Resources(HTMLParser):
    """Collects tags, and everything a browser would load or follow."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.alts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "img":
            self.alts.append(dict(attrs).get("alt"))


def parsed(path):
    page = Resources()
    page.feed(path.read_text())
    return page


def test_nothing_is_loaded_from_elsewhere(tmp_path, report):
    write(tmp_path / "report.html", report)
    page = parsed(tmp_path / "report.html")
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"url\(|@import|https?://", re.sub(r"data:[^\"]+", "", text))
    assert (tmp_path / "report.html").stat().st_size < 8e6


def test_every_picture_has_words(tmp_path, report):
    write(tmp_path / "report.html", report)
    page = parsed(tmp_path / "report.html")
    assert len(page.alts) == 12 + 2 * 4 + 1 + 3  # slides, pairs, ROC, curves
    assert all(alt for alt in page.alts)


def test_it_says_what_a_reader_must_know(tmp_path, report):
    write(tmp_path / "report.html", report)
    text = re.sub(r"\s+", " ", (tmp_path / "report.html").read_text())
    for sentence in (
        "A &lt;title&gt;",
        "transductive",
        "0.90 (0.80–1.00)",
        "stain may explain part of it",
        "Pass --mpp-csv",
        "no &lt;features&gt;",
        "and 2 more slides",
        "stays flat at its highest value",
        "classified wrongly",
    ):
        assert sentence in text, sentence
    assert words.SYNTHETIC not in text and words.TOO_FEW not in text


def test_synthetic_and_few_cases_are_said(tmp_path, report):
    report.synthetic = True
    report.results = {"y": {"20x only": make_run(tmp_path / "few", few=True)}}
    write(tmp_path / "report.html", report)
    text = (tmp_path / "report.html").read_text()
    assert words.SYNTHETIC in text and words.TOO_FEW in text
    assert "6 cases are too few to judge" in text


def test_an_empty_report_is_still_a_page(tmp_path):
    write(tmp_path / "report.html", Report(title="Nothing yet"))
    assert "Nothing yet" in (tmp_path / "report.html").read_text()


def test_the_same_content_is_the_same_file(tmp_path, report):
    write(tmp_path / "a.html", report)
    write(tmp_path / "b.html", report)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@pytest.mark.parametrize(
    "rows, expected",
    [
        ({"head": row(0.9, 0.8, 1.0)}, "PatHME bags tell the classes apart best, AUROC 0.90"),
        ({"head": row(0.6, 0.4, 0.8)}, "no kind of bag is surely better than guessing"),
        ({"head": row(None, None, None)}, "nothing can be said"),
        ({"head": row(0.9, 0.8, 1), "shuffled": row(0.8, 0.6, 1)}, "distrust this result"),
    ],
)
def test_the_verdict_follows_the_interval(rows, expected):
    metrics = {"PatHME": {"rows": rows, "too_few_to_judge": False, "cases": 40}}
    assert expected in words.verdict("y", metrics)


def test_the_overlay_colours_the_tiles_where_they_are():
    """Three tiles in the upper row of a white slide of four by two; the right one is attended most."""
    coords = np.array([[0, 0], [512, 0], [1024, 0]])
    data = figures.attention_overlay(
        np.full((400, 800, 3), 255, np.uint8), coords, np.array([1, 2, 9.0]), 512, (2048, 1024)
    )
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB).astype(int)
    h, w = image.shape[:2]
    blue, yellow = image[int(h * 0.25), int(w * 0.1)], image[int(h * 0.25), int(w * 0.5)]
    assert blue[2] > blue[0]
    assert yellow[0] > 200 and yellow[2] < 190  # red and green without blue
    for x in (0.1, 0.5):
        assert (image[int(h * 0.75), int(w * x)] > 245).all()  # glass stays white
