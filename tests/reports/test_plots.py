"""Figures: what is drawn is what was measured, and the same numbers are the same bytes."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from pathme_jax.evaluation.calibration import reliability
from pathme_jax.evaluation.metrics import average_precision
from pathme_jax.evaluation.survival import kaplan_meier, logrank
from pathme_jax.reports import evidence, plots, results

KINDS = ["classes", "labels", "number", "nll", "cox"]


def read(make_run, folder, kind, **more):
    return {"20x": results.read(make_run(folder, {"t": kind}, **more) / "t")}


def drawn(found, name):
    (one,) = [each for each in evidence.figures(found) if each.name == name]
    return one


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_the_same_bytes_twice_and_their_svg_is_xml(make_run, tmp_path, kind):
    found = read(make_run, tmp_path / "run", kind)
    twice = zip(evidence.figures(found), evidence.figures(found), strict=True)
    for first, second in twice:
        assert plots.encode(first.figure).startswith(b"\x89PNG")
        assert plots.encode(first.figure, "png") == plots.encode(second.figure, "png")
        svg = plots.encode(first.figure, "svg")
        assert svg == plots.encode(second.figure, "svg")
        assert ET.fromstring(svg).tag.endswith("svg")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("classes", ["roc", "precision_recall", "confusion", "calibration", "scores"]),
        ("labels", ["roc", "precision_recall", "confusion", "calibration"]),
        ("number", ["prediction"]),
        ("nll", ["kaplan_meier", "risk"]),
        ("cox", ["kaplan_meier", "risk"]),
    ],
)
def test_every_kind_has_its_figures_with_words(make_run, tmp_path, kind, names):
    figures = evidence.figures(read(make_run, tmp_path / "run", kind))
    assert [each.name for each in figures] == names
    assert all(len(each.alt) > 30 and each.caption for each in figures)


def test_kaplan_meier_draws_the_curves_of_each_folds_halves(make_run, tmp_path):
    """Folds whose risks lie on other scales: halves at a median of all would be whole folds."""
    found = read(make_run, tmp_path / "run", "cox")
    rows = found["20x"].cases
    for row in rows:
        row["risk"] = str(float(row["risk"]) + 100 * int(row["fold"]))
    time = np.array([float(row["time_months"]) for row in rows])
    event = np.array([int(row["event"]) for row in rows])
    risk = np.array([float(row["risk"]) for row in rows])
    fold = np.array([int(row["fold"]) for row in rows])
    high = np.concatenate([risk[fold == f] > np.median(risk[fold == f]) for f in range(3)])
    one = drawn(found, "kaplan_meier")
    above, below = one.figure.axes
    curves = [line for line in above.lines if line.get_drawstyle() == "steps-post"]
    for line, mine in zip(curves, (~high, high), strict=True):
        expected = kaplan_meier(time[mine], event[mine])
        np.testing.assert_array_equal(line.get_xdata(), np.append(0, expected.times))
        np.testing.assert_array_equal(line.get_ydata(), np.append(1, expected.survival))
    p = logrank(time, event, high)[1]
    assert above.get_title("left") == f"log-rank p {p:.3f}" and f"{p:.3f}" in one.alt
    for text in below.texts:  # numbers at risk
        t, row = text.get_position()
        mine = (~high, high)[round(-row)]
        assert int(text.get_text()) == (time[mine] >= t).sum()
    assert len(below.texts) >= 6


def test_confusion_counts_and_shares(make_run, tmp_path):
    found = read(make_run, tmp_path / "run", "classes", names=("a", "b", "c"))
    rows = found["20x"].cases
    counts = np.zeros((3, 3), int)
    for row in rows:
        said = max("abc", key=lambda name: float(row[f"score_{name}"]))
        counts["abc".index(row["label"]), "abc".index(said)] += 1
    (axes,) = drawn(found, "confusion").figure.axes
    told = {tuple(map(int, text.get_position()))[::-1]: text.get_text() for text in axes.texts}
    for (i, j), count in np.ndenumerate(counts):
        assert told[i, j] == f"{count}\n{100 * count / counts[i].sum():.0f} %"


def test_calibration_shows_the_bins_and_counts(make_run, tmp_path):
    found = read(make_run, tmp_path / "run", "classes")
    rows = found["20x"].cases
    scores = np.array([[float(r["score_neg"]), float(r["score_pos"])] for r in rows])
    labels = np.array([r["label"] == "pos" for r in rows]).astype(int)
    expected = reliability(scores, labels)
    above, below = drawn(found, "calibration").figure.axes
    np.testing.assert_allclose(above.lines[1].get_xdata(), expected.confidence)
    np.testing.assert_allclose(above.lines[1].get_ydata(), expected.frequency)
    assert [int(t.get_text()) for t in below.texts] == expected.count.tolist()
    ece = found["20x"].value("ece_width")
    assert f"{ece:.3f}" in drawn(found, "calibration").alt


def test_label_confusions_count_known_labels_at_one_half(make_run, tmp_path):
    found = read(make_run, tmp_path / "run", "labels")
    names = ("er", "pr", "her2")
    for axes, name in zip(drawn(found, "confusion").figure.axes, names, strict=False):
        counts = np.zeros((2, 2), int)
        for row in found["20x"].cases:
            if row[f"label_{name}"]:
                counts[int(row[f"label_{name}"]), int(float(row[f"score_{name}"]) >= 0.5)] += 1
        told = {tuple(map(int, t.get_position()))[::-1]: t.get_text() for t in axes.texts}
        for cell, count in np.ndenumerate(counts):
            assert told[cell].split("\n")[0] == str(count)
    assert counts.sum() < len(found["20x"].cases)  # some are unknown, else nothing is tested


def test_many_classes_show_the_hardest_curves(make_run, tmp_path):
    found = read(make_run, tmp_path / "run", "classes", names=[f"k{i}" for i in range(9)], cases=90)
    one = drawn(found, "roc")
    assert len(one.figure.axes[0].lines) == 1 + 6
    assert "Of 9, the 6 hardest are drawn" in one.caption


def test_the_area_under_precision_and_recall_is_the_average_precision():
    rng = np.random.default_rng(1)
    score = rng.random(40).round(1)  # with ties
    positive = rng.random(40) < 0.3
    recall, precision = results.precision_recall(score, positive)
    area = (np.diff(recall, prepend=0) * precision).sum()
    np.testing.assert_allclose(area, average_precision(score, positive)[0])


def test_losses_rest_where_a_head_rested(make_run, tmp_path):
    run = make_run(tmp_path / "run", {"t": "classes"})
    one = evidence.loss(run)
    lines = {line.get_label(): line for line in one.figure.axes[0].lines}
    expected = np.mean([0.7 * 0.9**0 + 0.02 * f for f in range(3)])
    np.testing.assert_allclose(lines["training"].get_ydata()[0], expected)
    validation = lines["validation"].get_ydata()
    assert np.isfinite(validation[17]) and np.isnan(validation[18:]).all()
    np.testing.assert_allclose(validation[17], 0.72 * 0.93**17 + 0.004 * 17 + 0.06)  # fold 2 alone


def test_one_group_or_no_event_is_survived(make_run, tmp_path):
    found = read(make_run, tmp_path / "run", "nll", cases=9)
    for row in found["20x"].cases:
        row.update(event="0", risk="1")
    assert "one group only" in drawn(found, "kaplan_meier").alt
    for each in evidence.figures(found):
        plots.encode(each.figure)


def test_a_case_tested_by_several_folds_is_told(make_run, tmp_path):
    found = read(make_run, tmp_path / "run", "cox")
    assert "counts once for each fold" not in drawn(found, "kaplan_meier").caption
    again = [{**row, "fold": str(int(row["fold"]) + 3)} for row in found["20x"].cases]
    found["20x"].cases.extend(again)
    assert "p then counts a case several times" in drawn(found, "kaplan_meier").caption
