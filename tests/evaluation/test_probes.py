"""Probes agree with a transcription, find what is there and nothing else, and keep cases apart."""

import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.evaluation.probes import knn, linear, probe


def blobs(separation, classes=2, cases=10, rows=6, width=8, seed=0):
    """`cases` cases a class, `rows` rows a case; each class is moved along an axis of its own."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), cases * rows)
    groups = np.repeat(np.arange(classes * cases), rows)
    features = rng.normal(size=(len(labels), width)) + separation * np.eye(width)[labels]
    return features, labels, groups


@pytest.mark.parametrize("k", [1, 5, 100])
def test_knn_is_the_weighted_vote_written_out(k):
    rng = np.random.default_rng(0)
    train, y, test = rng.normal(size=(30, 6)), np.arange(30) % 3, rng.normal(size=(7, 6))
    expected = np.zeros((7, 3))
    for i, x in enumerate(test):
        cosine = [x @ z / np.linalg.norm(x) / np.linalg.norm(z) for z in train]
        for j in np.argsort(cosine)[::-1][:k]:
            expected[i, y[j]] += np.exp(cosine[j] / 0.07)
    found = knn(train, y, test, k=k)
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), atol=1e-12)


def test_linear_does_not_depend_on_the_units_of_a_feature():
    features, labels, _ = blobs(2.0)
    units = 10.0 ** np.arange(-4, 4)
    a = linear(features[::2], labels[::2], features[1::2])
    b = linear(features[::2] * units, labels[::2], features[1::2] * units)
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_both_find_classes_that_lie_apart(classes):
    found = probe(*blobs(8.0, classes), seed=0)
    assert found["chance"] == 1 / classes
    assert all(value > 0.95 for name, value in found.items() if name != "chance"), found


def test_noise_is_at_chance():
    found = [probe(*blobs(0.0, seed=i), seed=i) for i in range(8)]
    for name in ("knn/accuracy", "knn/auroc", "linear/accuracy", "linear/auroc"):
        assert abs(np.mean([f[name] for f in found]) - 0.5) < 0.08


def test_an_encoder_that_knows_cases_gains_nothing_where_cases_are_apart():
    """Every case has a place of its own, whatever its class: perfect within cases, useless between them."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), 8)
    labels = groups % 2
    features = rng.normal(size=(40, 16))[groups] + 0.01 * rng.normal(size=(320, 16))
    apart = probe(features, labels, groups, seed=0)
    mixed = probe(features, labels, np.arange(320), seed=0)
    assert apart["knn/accuracy"] < 0.7 and apart["knn/auroc"] < 0.7
    assert mixed["knn/accuracy"] == 1


def test_labels_may_be_names_and_the_same_seed_gives_the_same():
    features, labels, groups = blobs(1.0)
    names = np.array(["normal", "tumour"])[labels]
    first = probe(features, names, groups, seed=3)
    assert first == probe(features, labels, groups, seed=3)
    assert first != probe(features, labels, groups, seed=4)


def test_what_cannot_be_probed_is_named():
    features, labels, groups = blobs(1.0)
    with pytest.raises(UserError, match="one class, 0"):
        probe(features, labels * 0, groups, seed=0)
    broken = features.copy()
    broken[[3, 5], 0] = np.nan, np.inf
    with pytest.raises(UserError, match="2 of 120 rows"):
        probe(broken, labels, groups, seed=0)
    few = groups < 13  # three cases of class 1
    with pytest.raises(UserError, match=r"class 1 has 3 group\(s\), fewer than the 5 folds"):
        probe(features[few], labels[few], groups[few], seed=0)
    assert "knn/auroc" in probe(features[few], labels[few], groups[few], seed=0, folds=3)
