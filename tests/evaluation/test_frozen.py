"""Probes by published protocols: their objectives, few-shot episodes, retrieval, and the command."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score, roc_auc_score

from pathme_jax.errors import UserError
from pathme_jax.evaluation.fewshot import episodes, prototypes
from pathme_jax.evaluation.linear_probe import LBFGS, AdamW, _criterion, cox_ridge, fit_predict
from pathme_jax.evaluation.protocols import PROTOCOLS, Protocol
from pathme_jax.evaluation.retrieval import Retrieval, macro, retrieve

REFERENCES = Path(__file__).parents[1] / "references"
NONE = (np.zeros((0, 6)), np.zeros(0, int))


def blobs(separation, classes=3, rows=40, width=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(classes * rows) % classes)
    return rng.normal(size=(len(labels), width)) + separation * np.eye(width)[labels], labels


def test_every_setting_of_every_protocol_says_where_it_is_from():
    settings = {field.name for field in dataclasses.fields(Protocol)} - {"sources"}
    assert all(set(protocol.sources) == settings for protocol in PROTOCOLS.values())


def test_unis_objective_is_at_its_minimum():
    """No step of the logits' weights and bias that predict the training rows lowers loss + |W| / (2 C)."""
    x, y = blobs(1.0)
    cost = 5.0
    p = fit_predict(LBFGS(cost, penalty="norm"), (x, y), NONE, x, 3)[0]
    logits = np.log(p) - np.log(p).mean(1, keepdims=True)
    fitted, *_ = np.linalg.lstsq(np.c_[x, np.ones(len(x))], logits, rcond=None)

    def objective(theta):
        z = np.c_[x, np.ones(len(x))] @ theta
        z = z - z.max(1, keepdims=True)
        loss = -(z[np.arange(len(y)), y] - np.log(np.exp(z).sum(1))).mean()
        return loss + np.linalg.norm(theta[:-1]) / (2 * cost)

    rng = np.random.default_rng(0)
    least = objective(fitted)
    steps = [objective(fitted + 0.01 * rng.normal(size=fitted.shape)) for _ in range(50)]
    scaled = [objective(fitted * by) for by in (0.98, 1.02)]
    assert np.linalg.norm(fitted) > 0.5 and min(steps + scaled) > least


def test_the_default_cost_is_features_times_classes_over_100():
    x, y = blobs(1.0)
    x = np.tile(x, (1, 50))
    a, b = (fit_predict(LBFGS(cost), (x, y), NONE, x, 3) for cost in (None, 300 * 3 / 100))
    np.testing.assert_allclose(a, b)


@pytest.mark.parametrize("penalty", ["norm", "squared"])
def test_a_class_absent_from_training_has_no_probability(penalty):
    x, y = blobs(3.0)
    kept = y != 1
    p = fit_predict(LBFGS(cost=10.0, penalty=penalty), (x[kept], y[kept]), NONE, x, 3)[0]
    assert (p[:, 1] == 0).all() and np.allclose(p.sum(1), 1)
    assert np.mean(p[kept].argmax(1) == y[kept]) > 0.9


def test_adamw_learns_and_its_runs_differ():
    x, y = blobs(3.0)
    settings = AdamW(1e-2, 1e-3, 1e-4, batch=32, epochs=30, runs=3)
    p = fit_predict(settings, (x[:80], y[:80]), (x[80:100], y[80:100]), x[100:], 3)
    assert p.shape == (3, 20, 3)
    assert np.mean(p.argmax(-1) == y[100:]) > 0.9
    assert np.abs(p[0] - p[1]).max() > 1e-4


def test_adamw_keeps_the_epoch_that_is_best_on_the_validation_part():
    """Validation labels that training unlearns: only the first epochs are right."""
    x, y = blobs(3.0, classes=2)
    settings = AdamW(
        3e-3, 3e-3, 0.0, batch=80, epochs=60, criterion="balanced_accuracy", initial=0.01
    )
    right = fit_predict(settings, (x, y), (x, y), x, 2)[0]
    wrong = fit_predict(settings, (x, y), (x, 1 - y), x, 2)[0]
    assert np.mean(right.argmax(1) == y) > 0.95 > 0.9 > np.mean(wrong.argmax(1) == y)


def test_patience_ends_a_run_that_no_longer_gains():
    """On noise, more epochs than patience allows change nothing."""
    x, y = blobs(0.0, classes=2)
    short = AdamW(1e-3, 1e-3, 0.0, batch=80, epochs=200, patience=3, runs=2)
    long = dataclasses.replace(short, epochs=400)
    endless = dataclasses.replace(short, patience=None)
    a, b, c = (
        fit_predict(s, (x[:60], y[:60]), (x[60:], y[60:]), x, 2) for s in (short, long, endless)
    )
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3


def test_the_criterion_is_the_macro_auroc_ties_included():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    logits = np.round(rng.normal(size=(60, 3)) + np.eye(3)[labels], 0)
    from scipy.special import softmax

    expected = roc_auc_score(labels, softmax(logits, 1), multi_class="ovr")
    # softmax of rounded logits may tie in one arithmetic and not in the other
    assert float(_criterion("auroc", logits.astype(np.float32), labels)) == pytest.approx(
        expected, abs=2e-3
    )


def test_cox_ridge_is_that_of_scikit_survival():
    spec = importlib.util.spec_from_file_location("make_survival", REFERENCES / "make_survival.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    stored = json.loads((REFERENCES / "survival.json").read_text())
    c = make.cohort("tied")
    found = cox_ridge(c["x"], c["time"], c["event"], make.PENALTY)
    np.testing.assert_allclose(found, stored["tied"]["cox_ridge"], atol=2e-3)


def test_prototypes_are_the_nearest_means_written_out():
    x, y = blobs(1.0)
    unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)  # noqa: E731
    source, query = unit(x[:60] - x[:60].mean(0)), unit(x[60:] - x[:60].mean(0))
    expected = [[-np.linalg.norm(q - source[y[:60] == c].mean(0)) for c in range(3)] for q in query]
    np.testing.assert_allclose(prototypes(x[:60], y[:60], x[60:], 3), expected)


def test_an_episode_with_all_rows_as_support_is_the_prototype_classifier():
    x, y = blobs(1.0)
    train = np.concatenate([np.flatnonzero(y == c)[:20] for c in range(3)])
    test = np.setdiff1d(np.arange(120), train)
    guess = prototypes(x[train], y[train], x[test], 3).argmax(1)
    expected = np.mean([np.mean(guess[y[test] == c] == c) for c in range(3)])
    found = episodes(x[train], y[train], x[test], y[test], 20, number=3)
    np.testing.assert_allclose(found, expected)


def test_more_shots_are_better_and_noise_is_at_chance():
    x, y = blobs(1.5, rows=60)
    few, many = (
        episodes(x[:120], y[:120], x[120:], y[120:], k, number=100).mean() for k in (1, 16)
    )
    assert many > few + 0.1
    x, y = blobs(0.0, rows=200)
    assert abs(episodes(x[:300], y[:300], x[300:], y[300:], 4, number=300).mean() - 1 / 3) < 0.03


def test_episodes_of_fewer_ways_are_judged_on_their_classes():
    x, y = blobs(8.0)
    found = episodes(x[:60], y[:60], x[60:], y[60:], 2, ways=2, number=20)
    assert (found > 0.95).all()


def test_more_shots_than_rows_are_refused():
    x, y = blobs(1.0)
    with pytest.raises(UserError, match="50 shots"):
        episodes(x, y, x, y, 50)


def test_retrieval_is_its_definition_written_out():
    x, y = blobs(1.0, classes=4, rows=20)
    settings = Retrieval(standardise=True, top=(1, 3))
    found = retrieve(x[:50], y[:50], x[50:], y[50:], 4, settings)
    z = (x - x[:50].mean(0)) / x[:50].std(0)
    for i, label in enumerate(y[50:]):
        distance = np.linalg.norm(z[:50] - z[50 + i], axis=1)
        near = y[:50][np.argsort(distance)]
        votes = np.bincount(near[:4], [1, 0.9, 0.8, 0.7], 4)
        assert found["recall@3"][i] == (label in near[:3])
        assert found["top@1"][i] == (votes.argmax() == label)
        assert found["top@3"][i] == (label in np.argsort(-votes, kind="stable")[:3])
        average = label_ranking_average_precision_score([near == label], [-np.arange(50.0)])
        assert found["map"][i] == pytest.approx(average)


def test_units_of_a_feature_matter_only_without_standardisation():
    x, y = blobs(2.0)
    wide = x * np.array([1, 1, 1, 1, 1, 1e3])
    for standardise in (True, False):
        settings = Retrieval(standardise=standardise)
        a, b = (retrieve(z[:80], y[:80], z[80:], y[80:], 3, settings)["map"] for z in (x, wide))
        assert np.allclose(a, b) == standardise


def test_macro_weighs_classes_alike():
    values, labels = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 1])
    np.testing.assert_allclose(macro(values, labels), [0.5])
