"""Paired comparisons agree with definitions written out, and are right about as often as they say."""

import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.evaluation.classification import OutOfFold
from pathme_jax.evaluation.compare import compare_auroc, delong, paired_bootstrap


def pair(gain, rows=120, folds=3, seed=0):
    """Two models of the same noise, the second with `gain` more signal."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % 2)
    shared = rng.normal(size=rows) + 0.7 * labels
    scores = [shared + rng.normal(size=rows) + extra * labels for extra in (0.0, gain)]
    fold = np.arange(rows) % folds
    cases = np.array([f"case{i}" for i in range(rows)])
    return [OutOfFold(np.stack([-s, s], 1), labels, fold, cases) for s in scores]


def test_delong_is_its_definition_written_out():
    a, b = pair(0.5, rows=60, folds=1)
    y = a.labels
    parts = []
    for s in (a.scores[:, 1], b.scores[:, 1]):
        s = np.round(s, 1)  # with ties
        wins = (s[y == 1][:, None] > s[y == 0]) + 0.5 * (s[y == 1][:, None] == s[y == 0])
        parts.append((wins.mean(), wins.mean(1), wins.mean(0)))
    variance = sum(np.var(parts[1][k] - parts[0][k], ddof=1) / len(parts[0][k]) for k in (1, 2))
    gained = parts[1][0] - parts[0][0]
    found = delong(np.round(a.scores[:, 1], 1), np.round(b.scores[:, 1], 1), y, a.folds)
    assert found["difference"] == pytest.approx(gained)
    from scipy.stats import norm

    assert found["p"] == pytest.approx(2 * norm.sf(abs(gained) / np.sqrt(variance)))


def test_delong_rejects_equal_models_as_often_as_it_says():
    found = [
        delong(
            *(m.scores[:, 1] for m in pair(0.0, seed=s)),
            pair(0.0, seed=s)[0].labels,
            np.arange(120) % 3,
        )["p"]
        for s in range(400)
    ]
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09


def test_a_planted_gain_is_found_by_all_three_tests():
    found = compare_auroc(*pair(1.5), draws=300)
    assert found["difference"] > 0.05 and found["interval"][0] > 0
    assert max(found[p] for p in ("bootstrap_p", "permutation_p", "delong_p")) < 0.02


def test_a_model_compared_with_itself_gains_nothing():
    a, _ = pair(0.0)
    found = compare_auroc(a, a, draws=100)
    assert found["difference"] == 0 and found["interval"] == (0, 0)
    assert found["permutation_p"] == found["delong_p"] == found["bootstrap_p"] == 1


def test_models_of_another_scale_are_compared_by_rank():
    a, b = pair(0.5)
    wide = OutOfFold(b.scores * 1e3 + 7, b.labels, b.folds, b.cases)
    assert compare_auroc(a, wide, draws=100) == compare_auroc(a, b, draws=100)


def test_the_order_of_rows_does_not_matter():
    a, b = pair(0.5)
    order = np.random.default_rng(0).permutation(120)
    mixed = OutOfFold(*(x[order] for x in (b.scores, b.labels, b.folds, b.cases)))
    assert compare_auroc(a, mixed, draws=100) == compare_auroc(a, b, draws=100)


def test_other_patients_are_refused():
    a, b = pair(0.5)
    b.cases = np.roll(b.cases, 1)
    with pytest.raises(UserError, match="differ in the cases"):
        compare_auroc(a, b)


def test_the_paired_interval_is_narrower_than_the_two_apart():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=1000)
    found = paired_bootstrap(hard, hard + 0.1 + 0.01 * rng.normal(size=1000))
    assert 0.07 < found["interval"][0] < found["interval"][1] < 0.13 and found["p"] < 0.01
