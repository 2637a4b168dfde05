"""The page of a slide-level run: it says what metrics.json says, for every kind, and survives what is not there."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import cv2
import h5py
import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.files import read_csv, read_json, write_json
from pathme_jax.report import main
from pathme_jax.reports import slide_level, words

KINDS = ["classes", "labels", "number", "nll", "cox"]
SIDE = 256


class Page(HTMLParser):
    """Tables as rows of cell texts, headings' levels, pictures, and what a browser would load."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.levels, self.alts, self.links, self.tags = [], [], [], [], []
        self.cell = False
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        self.links += [found[key] for key in ("src", "href", "srcset") if key in found]
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if tag == "img":
            self.alts.append(found.get("alt"))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.cell:
            self.tables[-1][-1][-1] += data

    def table(self, head):
        """The first table whose header holds this cell."""
        return next(table for table in self.tables if head in table[0])


def plain(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", "", page.text, flags=re.S)))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_what_the_metrics_say(make_run, tmp_path, kind):
    run = make_run(tmp_path / "run", {"t": kind})
    page = Page(slide_level.write(run))
    metrics = read_json(run / "t" / "metrics.json")
    measure, rows = metrics["measure"], metrics["rows"]

    def told(row):
        low, high = row["interval"]
        joint = " to " if low < 0 else "–"
        return f"{row[measure]:.2f} ({low:.2f}{joint}{high:.2f})"

    head, values = page.table("Mean pool")
    name = {"auroc": "AUROC", "c_index": "C-index", "pearson": "Pearson r"}[measure]
    assert head[:5] == ["Features", name, "Mean pool", "Mean colour", "Shuffled labels"]
    shown = [told(rows[row]) for row in ("head", "mean_pool", "mean_colour", "shuffled")]
    assert values == ["20x-uni", *shown, "0.001", f"{rows['head'][measure]:.2f} ± 0.03"]
    further = page.table("Measure")
    assert further[0][1:] == ["Head", "Mean pool", "Mean colour", "Shuffled labels"]
    others = {name: each for name, each in rows["head"]["measures"].items() if name != measure}
    assert len(further) - 1 == len(others) + ("logrank_p" in rows["head"])
    told_of = {row[0]: row[1] for row in further[1:]}
    for name, each in others.items():
        number = float(told_of[words.measure_name(name)].split(" ")[0])
        assert number == pytest.approx(each["value"], abs=0.006, rel=0.01)
    assert f"t: {'not surely' if 'not surely' in plain(page) else 'the slides'}" in plain(page)
    assert told(rows["head"]) in plain(page).split("Results")[0]  # the verdict
    assert f"{metrics['cases']} cases" in plain(page)


@pytest.mark.parametrize("kind", KINDS)
def test_every_slide_is_listed_with_its_fold(make_run, tmp_path, kind):
    run = make_run(tmp_path / "run", {"t": kind})
    head, *rows = Page(slide_level.write(run)).table("fold")
    written = {row["slide_id"]: row for row in read_csv(run / "t" / "predictions.csv")}
    listed = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert set(listed) == set(written)
    for slide, row in listed.items():
        was = written[slide]
        assert row["fold"] == was["fold"] and row["case"] == was["case_id"]
        if kind == "classes":
            said = max(("neg", "pos"), key=lambda name: float(was[f"score_{name}"]))
            assert (row["truth"], row["prediction"]) == (was["label"], said)
            assert row["probability"] == f"{float(was[f'score_{said}']):.2f}"
            assert row["judged"] == ("✓ right" if said == was["label"] else "✗ wrong")
        if kind == "labels":
            names = ("er", "pr", "her2")
            known = [n for n in names if was[f"label_{n}"]]
            right = all((float(was[f"score_{n}"]) >= 0.5) == (was[f"label_{n}"] == "1") for n in known)  # fmt: skip
            assert row["judged"] == ("✓ right" if right else "✗ wrong")
            assert ("unknown" in row["truth"]) == (len(known) < 3)
        if kind == "number":
            assert float(row["truth"]) == pytest.approx(float(was["truth"]), rel=0.01)
        if kind in ("nll", "cox"):
            assert row["state"] == ("event" if was["event"] == "1" else "censored")
            fold = [float(r["risk"]) for r in written.values() if r["fold"] == was["fold"]]
            assert row["half"] == ("high" if float(was["risk"]) > np.median(fold) else "low")


def test_mistakes_come_first(make_run, tmp_path):
    run = make_run(tmp_path / "run", {"t": "classes"})
    head, *rows = Page(slide_level.write(run)).table("judged")
    marks = [row[head.index("judged")] for row in rows]
    assert marks == sorted(marks, reverse=True) and "✗ wrong" in marks  # ✗ is after ✓


def test_several_tasks_in_one_run(make_run, tmp_path, thumbnails, whole_slides):
    tasks = {"er+pr": "labels", "hrd": "number", "os": "nll", "pfs": "cox", "grade": "classes"}
    run = make_run(tmp_path / "run", tasks)
    page = Page(slide_level.write(run, thumbnails, whole_slides))
    assert all(f"<h3>{task}</h3>" in page.text for task in tasks)
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"data:[^\"]+", "", page.text))
    assert all(page.alts)
    assert page.levels[0] == 1 and page.levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(page.levels, page.levels[1:], strict=False))
    files = {path.name for path in (run / "figures").iterdir()}
    assert {"os_kaplan_meier.svg", "hrd_prediction.png", "er+pr_roc.svg", "loss.png"} <= files
    assert "no such long thing" not in page.text and "61.5" not in page.text  # but its rounding


def test_a_rerun_leaves_the_same_files(make_run, tmp_path, thumbnails):
    run = make_run(tmp_path / "run", {"t": "number"})
    slide_level.write(run, thumbnails)
    files = [path for path in sorted(run.rglob("*")) if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    assert {path.suffix for path in files} >= {".html", ".svg", ".png", ".geojson"}
    slide_level.write(run, thumbnails)
    assert {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()} == before


def test_qupath_gets_squares_where_the_tiles_are(make_run, tmp_path):
    run = make_run(tmp_path / "run", {"t": "classes"})
    page = Page(slide_level.write(run))
    files = list((run / "qupath").glob("*.geojson"))
    assert 3 <= len(files) <= 4 and all(f"<b>{file.stem}</b>" in page.text for file in files)
    content = json.loads(files[0].read_text())
    assert content["type"] == "FeatureCollection"
    with h5py.File(run / "attention" / f"{files[0].stem}.h5") as file:
        coords, attention = file["coords"][:-1], file["attention"][:-1]  # the last is a prompt
    assert len(content["features"]) == len(coords) == 16
    for feature, (x, y), value in zip(content["features"], coords, attention, strict=True):
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        corners = {(x, y), (x + SIDE, y), (x, y + SIDE), (x + SIDE, y + SIDE)}
        assert ring[0] == ring[-1] and {tuple(point) for point in ring} == corners
        sides = np.abs(np.diff(ring, axis=0)).sum(1)
        assert (sides == SIDE).all()  # goes round, not across
        told = feature["properties"]
        assert told["objectType"] == "tile"
        assert told["measurements"]["attention"] == pytest.approx(float(value))
    names = [feature["properties"]["classification"]["name"] for feature in content["features"]]
    assert names[0] == "Attention 01 (least)" and names[-1] == "Attention 10 (most)"
    colours = [feature["properties"]["classification"]["color"] for feature in content["features"]]
    assert all(0 <= c <= 255 and isinstance(c, int) for colour in colours for c in colour)
    assert len({tuple(c) for c in colours}) == len(set(names)) == 10


def test_top_tiles_are_cut_where_attention_is_highest(make_run, tmp_path, thumbnails, whole_slides):
    """The painting's tiles darken along the grid, as attention grows: the darkest comes first."""
    from pathme_jax.reports import attention

    run = make_run(tmp_path / "run", {"t": "classes"})
    seen = attention.read(run / "attention" / "s0.h5")
    pictures = attention.Pictures(
        thumbnails, {s.slide_id: s for s in slide_level.find_slides(whole_slides)}
    )
    tiles = attention._look("s0", "told", seen, pictures).tiles
    greys = []
    for tile in tiles:
        image = cv2.imdecode(np.frombuffer(tile["image"], np.uint8), cv2.IMREAD_COLOR_RGB)
        assert image.shape == (224, 224, 3)
        greys.append(image[..., 0].mean())
    np.testing.assert_allclose(greys, [200 - 6 * i for i in range(15, 7, -1)], atol=2)
    assert (tiles[0]["x"], tiles[0]["y"]) == (4 * SIDE, 4 * SIDE)
    page = Page(slide_level.write(run, thumbnails, whole_slides))
    assert sum(alt.startswith("Tile ") for alt in page.alts) % 8 == 0
    assert "no folder of whole slides" not in page.text


def test_what_is_not_there_is_said(make_run, tmp_path, thumbnails, whole_slides):
    run = make_run(tmp_path / "run", {"t": "classes"}, attention=0)
    (run / "history.csv").unlink()
    (run / "run.json").unlink()
    text = plain(Page(slide_level.write(run, thumbnails)))
    assert "No attention is shown" in text and not (run / "qupath").exists()
    run = make_run(tmp_path / "other", {"t": "classes"})
    text = plain(Page(slide_level.write(run)))
    assert "no pictures of the slides were given" in text
    assert "no folder of whole slides was given" in text
    for file in thumbnails.iterdir():
        file.unlink()
    assert "there is no thumbnail of it" in plain(Page(slide_level.write(run, thumbnails)))
    for file in whole_slides.glob("*"):
        file.write_bytes(b"broken")
    text = plain(Page(slide_level.write(run, thumbnails, whole_slides)))
    assert "cannot be read" in text


def test_foreign_attention_without_sizes_is_said(make_run, tmp_path, thumbnails):
    run = make_run(tmp_path / "run", {"t": "classes"})
    for path in (run / "attention").iterdir():
        with h5py.File(path, "r+") as file:
            for key in list(file["coords"].attrs):
                del file["coords"].attrs[key]
    text = plain(Page(slide_level.write(run, thumbnails)))
    assert "does not say how large a tile is" in text and not (run / "qupath").exists()
    (run / "attention" / "s0.h5").write_bytes(b"no HDF5")
    slide_level.write(run, thumbnails)


def test_a_slide_without_a_thumbnail_is_drawn_from_the_slide_itself(
    make_run, tmp_path, whole_slides
):
    run = make_run(tmp_path / "run", {"t": "classes"})
    page = Page(slide_level.write(run, slides=whole_slides))
    assert sum("coloured by rank of attention" in alt for alt in page.alts) >= 3


def test_names_are_escaped(make_run, tmp_path):
    run = make_run(
        tmp_path / "run", {"t": "classes"}, slide="<script>{}", names=("<b>no", "yes&amp")
    )
    metrics = read_json(run / "t" / "metrics.json")
    metrics["name"] = "<script>bad"
    write_json(run / "t" / "metrics.json", metrics)
    page = Page(slide_level.write(run))
    assert "script" not in page.tags and "<b>no" not in page.text
    assert "&lt;script&gt;1" in page.text and "&lt;script&gt;bad" in page.text
    assert "yes&amp;amp" in page.text


def test_nothing_to_compare_is_a_page_too(make_run, tmp_path):
    run = make_run(tmp_path / "run", {"t": "nll"}, few=True)
    metrics = read_json(run / "t" / "metrics.json")
    for row in metrics["rows"].values():
        row.update(c_index=None, interval=[None, None], permutation_p=None, fold_mean=None)
        row["fold_std"] = None
    write_json(run / "t" / "metrics.json", metrics)
    text = plain(Page(slide_level.write(run)))
    assert "nothing can be said" in text and "too few to judge" in text


def test_bad_input_is_named(make_run, tmp_path, capsys):
    with pytest.raises(UserError, match=r"no <task>/metrics\.json"):
        slide_level.write(tmp_path)
    run = make_run(tmp_path / "run", {"t": "classes"})
    with pytest.raises(UserError, match="no such folder"):
        slide_level.write(run, tmp_path / "absent")
    with pytest.raises(UserError, match="absent"):
        slide_level.write(run, slides=tmp_path / "absent")
    (run / "t" / "cases.csv").unlink()
    with pytest.raises(UserError, match=r"cases\.csv"):
        slide_level.write(run)
    shutil.rmtree(run)
    with pytest.raises(SystemExit) as stopped:
        main([str(run)])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("error:") == 1


def test_the_launcher_names_the_page(make_run, tmp_path, capsys):
    run = make_run(tmp_path / "run", {"t": "classes"}, attention=1)
    main([str(run)])
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"


def test_a_report_needs_no_jax():
    code = "import pathme_jax.reports.slide_level, pathme_jax.reports.page, sys; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
