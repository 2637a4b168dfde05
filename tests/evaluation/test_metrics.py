"""Measures are scikit-learn's, in every resample at once."""

import numpy as np
import pytest
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from pathme_jax.evaluation import metrics
from pathme_jax.evaluation.calibration import expected_calibration_error, reliability
from pathme_jax.evaluation.intervals import bootstrap_weights, interval, permutation_p


def drawn(classes, rows=150, seed=0):
    """Scores with ties, some information, and two resamples."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % classes)
    logits = rng.normal(size=(rows, classes)) + 1.2 * np.eye(classes)[labels]
    scores = np.exp(np.round(logits, 1))
    weights = rng.integers(0, 3, (2, rows))
    return scores / scores.sum(1, keepdims=True), labels, weights


@pytest.mark.parametrize("classes", [2, 4])
def test_a_resample_measures_what_scikit_learn_says_of_its_rows(classes):
    scores, labels, weights = drawn(classes)
    found = metrics.classification(scores, labels, weights=weights)
    for i, w in enumerate(weights):
        rows = np.repeat(np.arange(len(labels)), w)
        y, s = labels[rows], scores[rows]
        p = s.argmax(1)
        one_hot = np.eye(classes)[y]
        if classes == 2:
            expected = {
                "auroc": reference.roc_auc_score(y, s[:, 1]),
                "auprc": reference.average_precision_score(y, s[:, 1]),
                "brier": reference.brier_score_loss(y, s[:, 1]),
            }
        else:
            expected = {
                "auroc": reference.roc_auc_score(y, s, multi_class="ovr"),
                "auprc": reference.average_precision_score(one_hot, s, average="macro"),
                "brier": np.mean(((s - one_hot) ** 2).sum(1)),
            }
        expected |= {
            "accuracy": reference.accuracy_score(y, p),
            "balanced_accuracy": reference.balanced_accuracy_score(y, p),
            "f1_macro": reference.f1_score(y, p, average="macro"),
            "f1_weighted": reference.f1_score(y, p, average="weighted"),
            "kappa": reference.cohen_kappa_score(y, p),
            "kappa_linear": reference.cohen_kappa_score(y, p, weights="linear"),
            "kappa_quadratic": reference.cohen_kappa_score(y, p, weights="quadratic"),
        }
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("bins", ["width", "mass"])
def test_reliability_is_the_calibration_curve_of_scikit_learn(bins):
    rng = np.random.default_rng(1)
    p = rng.random(400)
    labels = (rng.random(400) < p**2).astype(int)
    found = reliability(np.stack([1 - p, p], 1), labels, bins)
    strategy = {"width": "uniform", "mass": "quantile"}[bins]
    frequency, confidence = calibration_curve(labels, p, n_bins=10, strategy=strategy)
    np.testing.assert_allclose(found.frequency, frequency)
    np.testing.assert_allclose(found.confidence, confidence)
    gap = np.abs(frequency - confidence) @ found.count / 400
    ece = expected_calibration_error(np.stack([1 - p, p], 1), labels, bins)
    np.testing.assert_allclose(ece, [gap])


def test_probabilities_that_hold_are_calibrated_and_overconfident_ones_are_not():
    rng = np.random.default_rng(2)
    p = rng.random(20000)
    labels = (rng.random(20000) < p).astype(int)
    sure = (p > 0.5).astype(float)
    right, wrong = (
        expected_calibration_error(np.stack([1 - q, q], 1), labels)[0] for q in (p, sure)
    )
    assert right < 0.02 and abs(wrong - 0.25) < 0.02


def test_calibration_of_several_classes_is_of_the_predicted_one():
    scores = np.array([[0.6, 0.3, 0.1]] * 10)
    found = expected_calibration_error(scores, np.array([0] * 3 + [1] * 7))
    np.testing.assert_allclose(found, [0.3])


def test_a_class_absent_from_the_rows_is_left_out_of_the_means():
    scores, labels, _ = drawn(4)
    kept = labels != 2
    found = metrics.classification(scores[kept], labels[kept])
    assert all(np.isfinite(value).all() for value in found.values())
    recall = [np.mean(scores[labels == c].argmax(1) == c) for c in (0, 1, 3)]
    assert found["balanced_accuracy"][0] == pytest.approx(np.mean(recall))
    each = metrics.per_class(scores[kept], labels[kept])
    assert (
        np.isnan(each["auroc"]).tolist()
        == np.isnan(each["auprc"]).tolist()
        == [False, False, True, False]
    )


def test_unknown_labels_of_several_count_for_none():
    rng = np.random.default_rng(3)
    scores = rng.random((80, 3))
    labels = rng.integers(0, 2, (80, 3))
    hidden = labels.copy()
    hidden[:30, 1] = -1
    found = metrics.multilabel(scores, hidden)["auroc"][0]
    expected = [
        reference.roc_auc_score(labels[k:, i], scores[k:, i]) for i, k in enumerate((0, 30, 0))
    ]
    assert found == pytest.approx(np.mean(expected))


def test_regression_is_that_of_scikit_learn_and_numpy():
    rng = np.random.default_rng(4)
    truth = rng.normal(size=60)
    predicted = 0.5 * truth + rng.normal(size=60)
    weights = rng.integers(0, 3, (1, 60))
    rows = np.repeat(np.arange(60), weights[0])
    found = metrics.regression(predicted, truth, weights)
    assert found["r2"][0] == pytest.approx(reference.r2_score(truth[rows], predicted[rows]))
    assert found["pearson"][0] == pytest.approx(np.corrcoef(truth[rows], predicted[rows])[0, 1])
    assert found["mae"][0] == pytest.approx(np.abs(truth[rows] - predicted[rows]).mean())


def test_a_draw_takes_all_rows_of_a_patient_and_as_many_patients_of_each_class():
    cases = np.repeat(np.arange(12), 3)
    labels = (cases < 3).astype(int)
    weights = bootstrap_weights(cases, labels, 50)
    assert (weights.reshape(50, 12, 3) == weights.reshape(50, 12, 3)[:, :, :1]).all()
    assert (weights[:, labels == 1].sum(1) == 9).all() and (weights.sum(1) == 36).all()
    assert len(np.unique(weights, axis=0)) > 10


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """The mean of 40 normal values, 300 times over."""
    covered = 0
    for seed in range(300):
        x = np.random.default_rng(seed).normal(size=40)
        w = bootstrap_weights(np.arange(40), np.zeros(40), 400, seed)
        low, high = interval(w @ x / 40)
        covered += low < 0 < high
    assert 0.88 < covered / 300 < 0.98


def test_labels_shuffled_over_patients_tell_signal_from_none():
    scores, labels, _ = drawn(2, 80)
    cases = np.arange(80)

    def measure(y):
        return float(metrics.classification(scores, y)["balanced_accuracy"][0])

    assert permutation_p(measure, labels, cases, draws=200) < 0.02
    rng = np.random.default_rng(0)
    assert permutation_p(measure, rng.permutation(labels), cases, draws=200) > 0.05


def test_every_measure_comes_with_its_interval():
    scores, labels, _ = drawn(2)
    weights = bootstrap_weights(np.arange(150), labels, 200)
    found = metrics.with_intervals(
        lambda w: metrics.classification(scores, labels, weights=w), weights
    )
    for name in ("auroc", "auprc", "balanced_accuracy", "kappa", "brier"):
        low, high = found[name]["interval"]
        assert low < found[name]["value"] < high, name
