"""Two runs compared patient by patient: a true gain is found, none is not, and other patients are refused."""

from __future__ import annotations

import numpy as np
import pytest

from pathme_jax import compare as launcher
from pathme_jax.errors import UserError
from pathme_jax.files import write_csv, write_json
from pathme_jax.mil.comparison import compare

N = 120


def write(folder, kind, noise, seed, n=N, shift=0.0):
    """A run whose scores are the truth under noise; the noise of a patient is partly that of every run."""
    hard, own = np.random.default_rng(0).normal(size=n), np.random.default_rng(seed).normal(size=n)
    truth = np.random.default_rng(9).normal(size=n)
    score = truth + noise * (0.8 * hard + 0.6 * own)
    rows = []
    for i in range(n):
        row = {"case_id": f"c{i}", "fold": i % 4}
        if kind == "classes":
            p = 1 / (1 + np.exp(-score[i]))
            row |= {"label": "ab"[int(truth[i] > shift)], "score_a": 1 - p, "score_b": p}
        elif kind == "labels":
            row |= {"label_a": int(truth[i] > 0), "label_b": "" if i % 3 else int(truth[i] > 1)}
            row |= {"score_a": score[i], "score_b": score[i]}
        elif kind == "number":
            row |= {"truth": truth[i], "prediction": score[i]}
        else:
            row |= {"time_months": np.exp(-truth[i]), "event": int(i % 5 > 0), "risk": score[i]}
        rows.append(row)
    folder.mkdir()
    write_csv(folder / "cases.csv", rows, list(rows[0]))
    measure = {"classes": "auroc", "labels": "auroc", "number": "pearson"}.get(kind, "c_index")
    names = ["a", "b"] if kind in ("classes", "labels") else []
    write_json(
        folder / "metrics.json", {"task": "y", "kind": kind, "measure": measure, "classes": names}
    )
    return folder


@pytest.mark.parametrize("kind", ["classes", "labels", "number", "cox"])
def test_a_gain_is_found_and_none_is_not(tmp_path, kind):
    worse, better = (
        write(tmp_path / "worse", kind, 2.0, 1),
        write(tmp_path / "better", kind, 0.6, 2),
    )
    found = compare(worse, better, draws=200)
    assert found["difference"] > 0.05 and found["interval"][0] > 0
    assert found["permutation_p"] < 0.05 and found["bootstrap_p"] < 0.05
    assert found["second"] - found["first"] == pytest.approx(found["difference"], abs=2e-6)
    turned = compare(better, worse, draws=200)
    assert turned["difference"] == pytest.approx(-found["difference"])
    alike = compare(worse, write(tmp_path / "alike", kind, 2.0, 3), draws=200)
    assert alike["interval"][0] < 0 < alike["interval"][1] and alike["permutation_p"] > 0.05
    same = compare(worse, worse, draws=50)
    assert same["difference"] == 0 and same["permutation_p"] == 1


def test_runs_that_cannot_be_compared_say_why(tmp_path):
    first = write(tmp_path / "first", "classes", 1.0, 1)
    with pytest.raises(UserError, match=r"patient 'c119' is tested in fold 3 of .*first only"):
        compare(first, write(tmp_path / "fewer", "classes", 1.0, 1, n=N - 1))
    with pytest.raises(UserError, match="has another truth"):
        compare(first, write(tmp_path / "other", "classes", 1.0, 1, shift=0.3))
    with pytest.raises(UserError, match="different tasks"):
        compare(first, write(tmp_path / "survival", "cox", 1.0, 1))
    with pytest.raises(UserError, match=r"no metrics\.json"):
        compare(first, tmp_path)


def test_the_launcher_says_what_was_gained(tmp_path, capsys):
    folders = [write(tmp_path / str(i), "classes", noise, i) for i, noise in ((1, 2.0), (2, 0.5))]
    launcher.main([*map(str, folders), "--draws", "50"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("auroc 0.") and "120 patients" in said[0]
    assert said[1].startswith("difference +0.")
