"""Survival measures agree with scikit-survival and lifelines, ties and censoring included."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from pathme_jax.evaluation import survival
from pathme_jax.evaluation.survival import OutOfFold, concordance

REFERENCES = Path(__file__).parents[1] / "references"
_SPEC = importlib.util.spec_from_file_location("make_survival", REFERENCES / "make_survival.py")
make = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(make)
STORED = json.loads((REFERENCES / "survival.json").read_text())

each_cohort = pytest.mark.parametrize("name", make.COHORTS)


@each_cohort
def test_kaplan_meier_and_its_interval_are_those_of_lifelines(name):
    c, stored = make.cohort(name), STORED[name]
    curve = survival.kaplan_meier(c["time"], c["event"])
    np.testing.assert_allclose(curve.times, stored["km_times"], atol=1e-9)
    np.testing.assert_allclose(curve.survival, stored["km"], atol=1e-9)
    inside = (curve.survival < 1) & (curve.survival > 0)
    np.testing.assert_allclose(curve.low[inside], np.array(stored["km_low"])[inside], atol=1e-8)
    np.testing.assert_allclose(curve.high[inside], np.array(stored["km_high"])[inside], atol=1e-8)


@each_cohort
def test_logrank_of_three_groups_is_that_of_lifelines(name):
    c = make.cohort(name)
    group = np.digitize(c["x"][:, 0], [-0.4, 0.6])
    found = survival.logrank(c["time"], c["event"], group)
    np.testing.assert_allclose(found, STORED[name]["logrank"], rtol=1e-7, atol=1e-10)


@each_cohort
def test_concordance_is_that_of_scikit_survival_and_lifelines(name):
    c = make.cohort(name)
    found = concordance(c["risk"], c["time"], c["event"])
    np.testing.assert_allclose(found, STORED[name]["c_sksurv"], atol=1e-9)
    np.testing.assert_allclose(found, STORED[name]["c_lifelines"], atol=1e-9)


def test_equal_risks_count_half_and_equal_event_times_not_at_all():
    time, event = np.array([1.0, 2.0, 2.0]), np.array([1, 1, 1])
    assert concordance(np.array([0.0, 0.0, 5.0]), time, event) == 0.25  # one tie, one wrong
    assert np.isnan(concordance(np.array([1.0, 2.0]), time[1:], event[1:]))


def test_a_patient_lost_when_another_has_the_event_lived_longer():
    assert concordance(np.array([2.0, 1.0]), np.array([3.0, 3.0]), np.array([1, 0])) == 1.0


def test_risks_of_different_folds_are_not_compared():
    c = make.cohort("tied")
    folds = np.arange(len(c["time"])) % 3
    shifted = c["risk"] + 100.0 * folds
    found = concordance(shifted, c["time"], c["event"], folds)
    assert found == concordance(c["risk"], c["time"], c["event"], folds)
    assert found > concordance(shifted, c["time"], c["event"]) + 0.05


def test_weights_of_a_resample_are_rows_repeated():
    c = make.cohort("tied")
    rng = np.random.default_rng(0)
    weights = rng.multinomial(120, np.full(120, 1 / 120), size=3)
    found = concordance(c["risk"], c["time"], c["event"], None, weights)
    for value, w in zip(found, weights, strict=True):
        rows = np.repeat(np.arange(120), w)
        assert value == pytest.approx(
            concordance(c["risk"][rows], c["time"][rows], c["event"][rows])
        )


@each_cohort
def test_dynamic_auc_is_that_of_scikit_survival(name):
    c, stored = make.cohort(name), STORED[name]
    values, mean = survival.dynamic_auc(c["risk"], c["time"], c["event"], make.AT)
    np.testing.assert_allclose(values, stored["auc"], atol=1e-9)
    np.testing.assert_allclose(mean, stored["mean_auc"], atol=1e-9)


@each_cohort
def test_brier_scores_are_those_of_scikit_survival(name):
    c, stored = make.cohort(name), STORED[name]
    values, integral = survival.brier(c["survival"], c["time"], c["event"], make.AT)
    np.testing.assert_allclose(values, stored["brier"], atol=1e-9)
    np.testing.assert_allclose(integral, stored["integrated_brier"], atol=1e-9)


def test_what_follow_up_does_not_reach_is_not_a_number():
    c = make.cohort("plain")
    past = np.array([8.0, c["time"].max() + 1])
    assert np.isnan(survival.dynamic_auc(c["risk"], c["time"], c["event"], past)[0]).tolist() == [
        False,
        True,
    ]
    followed = (np.array([2.0, 2.5, 2.5]), np.array([0, 1, 0]))  # a reference of 2.5 months only
    scores, _ = survival.brier(
        np.full((120, 2), 0.5), c["time"], c["event"], np.array([1.0, 8.0]), followed
    )
    assert np.isnan(scores).tolist() == [False, True]


def test_curves_of_bins_are_linear_between_their_edges():
    edges = np.array([0.0, 10.0, 20.0])
    found = survival.at_times(np.array([[0.6, 0.2]]), edges, np.array([0, 5, 10, 15, 20, 99.0]))
    np.testing.assert_allclose(found, [[1, 0.8, 0.6, 0.4, 0.2, 0.2]])


def _found(risk, c, seed=0):
    folds = np.random.default_rng(seed).permutation(np.arange(120) % 5)
    return OutOfFold(
        risk, c["time"], c["event"], folds, np.arange(120).astype(str), c["survival"], make.AT
    )


def test_a_planted_risk_has_an_interval_above_chance_and_a_small_p():
    c = make.cohort("plain")
    found = survival.measures(_found(c["risk"], c), draws=300)
    assert (
        found["interval"][0] > 0.5 and found["permutation_p"] < 0.01 and found["logrank_p"] < 0.01
    )
    assert found["interval"][0] < found["c_index"] < found["interval"][1]
    np.testing.assert_allclose(found["brier"], STORED["plain"]["brier"], atol=1e-9)


def test_shuffled_times_are_at_chance():
    c = make.cohort("plain")
    order = np.random.default_rng(3).permutation(120)
    shuffled = {**c, "time": c["time"][order], "event": c["event"][order]}
    found = survival.measures(_found(c["risk"], shuffled), draws=300)
    assert found["interval"][0] < 0.5 < found["interval"][1] and found["permutation_p"] > 0.05


def test_uncertain_half_of_the_cases_is_split_within_each_fold():
    """Folds whose risks lie far apart must not make the two halves of the log-rank test."""
    c = make.cohort("plain")
    one = _found(c["risk"], c)
    far = _found(c["risk"] + 100.0 * one.folds, c)
    a, b = (survival.measures(f, draws=2) for f in (one, far))
    assert a["logrank_chi2"] == b["logrank_chi2"] and a["mean_auc"] == b["mean_auc"]
