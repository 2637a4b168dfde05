"""The report: one file with nothing outside it, that says what a reader must know."""

import json
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from pathme_jax.files import read_json, write_json
from pathme_jax.reports import figures, words
from pathme_jax.reports.page import Report, write


def row(auroc, low, high):
    return {"auroc": auroc, "interval": [low, high]}


def amend(folder, **rows):
    """Other numbers in a task's metrics.json."""
    metrics = read_json(folder / "metrics.json")
    for name, values in rows.items():
        metrics["rows"][name] |= values
    write_json(folder / "metrics.json", metrics)


@pytest.fixture
def report(tmp_path, make_run, thumbnails):
    log = tmp_path / "metrics.jsonl"
    lines = [
        {"step": s, "loss": 5 - s, "loss/koleo": 0.1, "teacher_entropy": 2.0, "grad_norm": 1.0}
        for s in range(4)
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, last = (make_run(tmp_path / name, {"y": "classes"}) / "y" for name in ("a", "b"))
    amend(first, head=row(0.6, 0.4, 0.8))
    amend(last, head=row(0.9, 0.8, 1.0), mean_colour=row(0.8, 0.6, 0.9))
    return Report(
        title="A <title>",
        results={"y": {"20x only": first, "PatHME": last}},
        comparisons={
            "y": [
                {
                    "first": "20x only",
                    "second": "PatHME",
                    "difference": 0.3,
                    "interval": [-0.05, 0.41],
                    "permutation_p": 0.0004,
                }
            ]
        },
        slides=[{"slide_id": f"s{i}", "state": "done"} for i in range(14)],
        overviews=thumbnails,
        thumbnails=thumbnails,
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
    shown = len([alt for alt in page.alts if "coloured by rank" in alt])
    assert shown >= 3
    assert len(page.alts) == 12 + 2 * shown + 5 + 3  # slides, pairs, figures, curves
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
        "Is the difference real?",
        "+0.30 (-0.05 to +0.41)",
        "&lt; 0.001",
        "figures and slides are those of PatHME",
    ):
        assert sentence in text, sentence
    assert words.SYNTHETIC not in text and words.TOO_FEW not in text


def test_synthetic_and_few_cases_are_said(tmp_path, report, make_run):
    report.synthetic = True
    few = make_run(tmp_path / "few", {"y": "classes"}, few=True, cases=6)
    report.results = {"y": {"20x only": few / "y"}}
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
    one = {"rows": rows, "too_few_to_judge": False, "cases": 40}
    one |= {"measure": "auroc", "kind": "classes"}
    metrics = {"20x": one | {"rows": {"head": row(0.5, 0.4, 0.6)}}, "PatHME": one}
    if rows["head"]["auroc"] is None:
        metrics.pop("20x")
    assert expected in words.verdict("y", metrics)


def test_a_verdict_says_where_mean_pooling_does_as_well():
    rows = {"head": row(0.9, 0.8, 1.0), "mean_pool": row(0.91, 0.8, 1.0)}
    one = {"rows": rows, "too_few_to_judge": False, "measure": "auroc", "kind": "classes"}
    assert "Mean pooling does as well, 0.91" in words.verdict("y", {"20x": one})
    rows["mean_pool"] = row(0.89, 0.8, 1.0)
    assert "Mean pooling" not in words.verdict("y", {"20x": one})


def test_correlations_are_held_against_zero():
    one = {"too_few_to_judge": False, "measure": "pearson", "kind": "number"}
    good = one | {"rows": {"head": {"pearson": 0.3, "interval": [0.1, 0.5]}}}
    poor = one | {"rows": {"head": {"pearson": 0.3, "interval": [-0.1, 0.5]}}}
    assert "tell the high from the low, Pearson r 0.30" in words.verdict("y", {"20x": good})
    assert "not surely better than guessing" in words.verdict("y", {"20x": poor})
    assert "0.30 (-0.10 to 0.50)" in words.verdict("y", {"20x": poor})


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
