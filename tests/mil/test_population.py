"""The population trainer: members are independent, weights mean what they say, planted instances are found."""

import dataclasses

import jax
import numpy as np
import pytest

from pathme_jax.evaluation.auroc import auroc
from pathme_jax.mil.baselines import logistic
from pathme_jax.mil.folds import TEST, TRAIN, VALIDATION, stratified
from pathme_jax.mil.heads import ABMIL
from pathme_jax.mil.settings import Settings
from pathme_jax.mil.train import (
    Members,
    _init,
    _standardisation,
    _step,
    bag_weights,
    fit,
    predict,
)


def members_of(parts, labels, cases):
    weights = np.array([bag_weights(part, labels, cases) for part in parts])
    return Members(parts, np.tile(labels, (len(parts), 1)), weights)


def planted(n=56, m=40, d=8, witnesses=1, seed=0):
    """Bags that differ in one strange instance of forty (2.5 %), under slide-wide shifts as of stain."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    bags = [
        (rng.normal(size=(m - i % 7, d)) + 0.4 * rng.normal(size=d)).astype(np.float32)
        for i in range(n)
    ]
    for bag, label in zip(bags, labels, strict=True):
        bag[:witnesses, 0] += 9 * label
    return bags, labels, [f"c{i}" for i in range(n)]


@pytest.fixture(scope="module")
def cohort():
    bags, labels, cases = planted()
    parts = stratified(cases, labels, ["0", "1"], 3, 0)
    settings = Settings(epochs=20, learning_rate=3e-3)
    members = members_of(parts, labels, cases)
    return bags, labels, members, settings, fit(bags, members, 2, settings)


def test_planted_instances_are_found_where_the_mean_hides_them(cohort):
    bags, labels, members, _, population = cohort
    pairs = np.argwhere(members.parts == TEST)
    scores, attention = predict(population, bags, pairs)
    mean_pool = logistic(np.array([bag.mean(0) for bag in bags]), members, 2, pairs)
    truth, folds = labels[pairs[:, 1]], pairs[:, 0]
    assert auroc(scores, truth, folds) > 0.95
    assert auroc(mean_pool, truth, folds) < 0.75
    on_planted = np.array([a[0] for a in attention])  # uniform attention would give 1/40
    assert on_planted[truth == 1].mean() > 0.4 > 0.1 > on_planted[truth == 0].mean()
    np.testing.assert_allclose([a.sum() for a in attention], 1, atol=1e-5)
    assert [len(a) for a in attention] == [len(bags[b]) for b in pairs[:, 1]]


def test_a_member_is_the_same_alone(cohort):
    bags, _, members, settings, population = cohort
    alone = Members(members.parts[1:2], members.labels[1:2], members.weights[1:2])
    single = fit(bags, alone, 2, settings)
    np.testing.assert_allclose(population.history[1, :5], single.history[0, :5], atol=1e-4)
    pairs = np.argwhere(alone.parts == TEST)
    expected, _ = predict(single, bags, pairs)
    found, _ = predict(population, bags, pairs + np.array([1, 0]))
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_the_same_again_is_the_same_to_the_bit(cohort):
    bags, _, members, settings, population = cohort
    again = fit(bags, members, 2, settings)
    for a, b in zip(jax.tree.leaves(population.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_held_out_bags_leave_no_trace(cohort):
    bags, _, members, settings, _ = cohort
    settings = dataclasses.replace(settings, epochs=3)
    changed = [
        bag * 9 + 5 if part == TEST else bag
        for bag, part in zip(bags, members.parts[0], strict=True)
    ]
    first = Members(members.parts[:1], members.labels[:1], members.weights[:1])
    a, b = fit(bags, first, 2, settings), fit(changed, first, 2, settings)
    for one, other in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_batch_of_held_out_bags_moves_nothing(cohort):
    """Momentum and weight decay would move it, were the update not skipped."""
    bags, _, _, settings, _ = cohort
    head = ABMIL(2, settings.hidden, settings.attention, settings.dropout)
    key = jax.random.key(0)
    state = _init(head, 2, 8, key)
    x = bags[0][None, :20], np.ones((1, 20), bool)
    standard = np.zeros((2, 8), np.float32), np.ones((2, 8), np.float32)
    weights = np.array([[1.0], [0.0]], np.float32)  # held out of the second member
    labels = np.array([[1], [1]])
    after, _ = _step(head, 0.1, state, x, labels, weights, standard, (key, 0), 1e-2)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
    moved = after["params"]["classify"]["kernel"] - state["params"]["classify"]["kernel"]
    assert np.abs(moved[0]).min() > 0


def test_weights_balance_classes_and_cases():
    cases = ["a", "a", "b", "c", "d", "e"]
    labels = np.array([0, 0, 0, 1, 1, 1])
    parts = np.array([TRAIN] * 4 + [TEST, TRAIN])
    weights = bag_weights(parts, labels, cases)
    assert weights[4] == 0
    assert np.isclose(weights[labels == 0].sum(), weights[labels == 1].sum())
    assert np.isclose(weights[0] + weights[1], weights[2])
    assert np.isclose(weights.sum(), 5)


def test_a_validation_part_chooses_the_epoch():
    """The validation bags are labelled wrongly, so that the loss on them rises as training goes on."""
    bags, labels, cases = planted(n=24, witnesses=6)
    parts = np.where(np.arange(24) < 14, TRAIN, np.where(np.arange(24) < 20, VALIDATION, TEST))
    wrong = np.where(parts == VALIDATION, 1 - labels, labels)
    settings = Settings(epochs=12)
    members = members_of(parts[None], wrong, cases)
    kept = fit(bags, members, 2, settings)
    assert np.argmin(kept.history[0, :, 1]) < 3
    pairs = np.argwhere(parts[None] == VALIDATION)
    scores, _ = predict(kept, bags, pairs)
    own = np.take_along_axis(scores, wrong[pairs[:, 1]][:, None], 1)[:, 0]
    per_class = [np.mean(-np.log(own[wrong[pairs[:, 1]] == c])) for c in (0, 1)]
    assert np.isclose(np.mean(per_class), kept.history[0, :, 1].min(), atol=1e-4)


def test_uneven_bags_train_in_buckets_and_predict_on_all_instances():
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(n, 3)).astype(np.float32) for n in [900, 40, 50, 60, 30, 45]]
    labels, cases = np.array([0, 1] * 3), list("abcdef")
    members = members_of(np.array([[TEST, TRAIN, TRAIN, TRAIN, TRAIN, TEST]]), labels, cases)
    population = fit(bags, members, 2, Settings(epochs=2, max_instances=64))
    scores, attention = predict(population, bags, np.array([[0, 0], [0, 5]]))
    assert [len(a) for a in attention] == [900, 45]
    assert np.isfinite(scores).all() and np.isclose(attention[0].sum(), 1, atol=1e-4)


def test_standardisation_is_of_the_training_bags_and_spares_constant_features():
    bags = [np.array([[1, 7.7], [3, 7.7]]), np.array([[100, 0]]), np.array([[5, 7.7]])]
    mean, std = _standardisation(bags, np.array([[TRAIN, TEST, TRAIN]]))
    np.testing.assert_allclose(mean, [[3, 7.7]], rtol=1e-6)
    np.testing.assert_allclose(std, [[np.sqrt(8 / 3), 1]], rtol=1e-6)
