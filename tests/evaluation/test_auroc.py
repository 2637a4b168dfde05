"""AUROC agrees with scikit-learn, compares within folds only, and its interval and p value mean what they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from pathme_jax.evaluation.auroc import auroc, bootstrap_interval, permutation_p, roc


def binary(score):
    return np.stack([1 - np.asarray(score, float), np.asarray(score, float)], 1)


@given(rows=st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_binary_auroc_is_scikit_learns_with_ties(rows):
    score, label = np.array([r[0] / 5 for r in rows]), np.array([int(r[1]) for r in rows])
    found = auroc(binary(score), label)
    if len(set(label.tolist())) < 2:
        assert np.isnan(found)
    else:
        assert np.isclose(found, roc_auc_score(label, score))


def test_macro_auroc_is_scikit_learns_one_against_rest():
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(3), 60).round(1)
    scores /= scores.sum(1, keepdims=True)
    label = rng.integers(0, 3, 60)
    expected = roc_auc_score(label, scores, multi_class="ovr", average="macro")
    assert np.isclose(auroc(scores, label), expected)


def test_within_folds_is_the_mean_of_the_folds_weighted_by_pairs():
    rng = np.random.default_rng(1)
    score, label, fold = rng.random(50), rng.integers(0, 2, 50), rng.integers(0, 4, 50)
    values, pairs = [], []
    for f in range(4):
        mine = fold == f
        values.append(roc_auc_score(label[mine], score[mine]))
        pairs.append(label[mine].sum() * (1 - label[mine]).sum())
    assert np.isclose(auroc(binary(score), label, fold), np.average(values, weights=pairs))


def test_an_offset_between_folds_does_not_matter_within_them():
    label, fold = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    score = np.array([0.1, 0.2, 0.8, 0.9])
    assert auroc(binary(score), label, fold) == 1
    assert auroc(binary(score), label) == 0.75


def test_the_roc_curve_has_the_auroc_as_area():
    rng = np.random.default_rng(2)
    scores, label = rng.dirichlet(np.ones(3), 90), rng.integers(0, 3, 90)
    fold = rng.integers(0, 3, 90)
    x, y = roc(scores, label, fold, points=4001)
    assert abs(np.trapezoid(y, x) - auroc(scores, label, fold)) < 2e-3
    assert (np.diff(y) >= -1e-12).all() and y[-1] == 1


@pytest.mark.parametrize("separation", [0.0, 1.0])
def test_the_interval_covers_the_truth_as_often_as_it_says(separation):
    """For two unit Gaussians `separation` apart the AUROC is Phi(separation / sqrt 2)."""
    from math import erf

    truth = 0.5 * (1 + erf(separation / 2))
    rng = np.random.default_rng(3)
    hits = 0
    for i in range(150):
        label = np.arange(60) % 2
        score = rng.normal(size=60) + separation * label
        low, high = bootstrap_interval(binary(score), label, None, np.arange(60), draws=300, seed=i)
        hits += low <= truth <= high
    assert 0.88 <= hits / 150 <= 0.99


def test_rows_of_a_patient_are_drawn_together():
    """Ten rows of each patient hold no more information than one."""
    rng = np.random.default_rng(4)
    label = np.arange(24) % 2
    score = rng.normal(size=24) + label
    once = bootstrap_interval(binary(score), label, None, np.arange(24), draws=2000)
    tenfold = np.repeat(np.arange(24), 10)
    many = bootstrap_interval(
        binary(score[tenfold]), label[tenfold], np.tile(np.arange(10), 24), tenfold, draws=2000
    )
    np.testing.assert_allclose(many, once, atol=0.01)


def test_the_interval_is_the_same_every_time():
    rng = np.random.default_rng(5)
    label, score = np.arange(30) % 2, rng.random(30)
    first = bootstrap_interval(binary(score), label, None, np.arange(30), seed=1)
    assert first == bootstrap_interval(binary(score), label, None, np.arange(30), seed=1)


def test_nothing_to_compare_is_nan_without_a_warning():
    scores, label = binary([0.1, 0.9]), np.array([1, 1])
    assert np.isnan(auroc(scores, label))
    assert np.isnan(bootstrap_interval(scores, label, None, np.arange(2))).all()


def test_permutation_p_is_small_for_signal_and_even_for_noise():
    rng = np.random.default_rng(6)
    label, cases = np.arange(40) % 2, np.arange(40)
    assert permutation_p(binary(label + 0.1 * rng.random(40)), label, None, cases) < 0.01
    ps = [
        permutation_p(binary(rng.random(40)), label, None, cases, draws=200, seed=i)
        for i in range(100)
    ]
    assert 0.4 < np.mean(ps) < 0.6 and 0.0 <= np.mean(np.array(ps) < 0.05) < 0.13


def test_permutation_moves_patients_not_rows():
    """Two patients with fifty rows each: two labelings exist, so no p value can be small."""
    cases = np.repeat([0, 1], 50)
    assert permutation_p(binary(cases * 0.5), cases, None, cases) > 0.3
