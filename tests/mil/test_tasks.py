"""Losses of each kind of task, against scikit-learn's and by hand; unknown targets weigh nothing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import log_loss

from pathme_jax.errors import UserError
from pathme_jax.losses import survival
from pathme_jax.mil.tasks import Task, Tasks

rng = np.random.default_rng(0)
WEIGHT = np.array([1.0, 2.0, 0.0, 0.5], np.float32)


def loss(task: Task, logits: np.ndarray, target: np.ndarray, weight: np.ndarray = WEIGHT) -> float:
    parts = (jnp.asarray(x, jnp.float32) for x in (logits, target, weight))
    return float(task.loss(*parts))


def test_classes_are_cross_entropy():
    task, logits = Task("y", "classes", ("a", "b", "c")), rng.normal(size=(4, 3))
    target = np.array([0, 2, 1, 1])
    expected = log_loss(
        target, task.predict(logits), sample_weight=WEIGHT, labels=[0, 1, 2], normalize=False
    )
    assert loss(task, logits, target[:, None]) == pytest.approx(expected, rel=1e-5)
    assert (task.outputs, task.width) == (3, 1)


def test_labels_that_may_hold_together_are_binary_each_and_unknown_ones_are_left_out():
    task, logits = Task("y", "labels", ("a", "b")), rng.normal(size=(4, 2))
    target = np.array([[0, 1], [1, np.nan], [np.nan, np.nan], [np.nan, np.nan]])
    p = task.predict(logits)
    expected = -(np.log(1 - p[0, 0]) + np.log(p[0, 1])) / 2 - 2 * np.log(p[1, 0])
    assert loss(task, logits, target) == pytest.approx(expected, rel=1e-5)
    assert (task.outputs, task.width) == (2, 2)


def test_a_number_is_a_squared_error():
    target = np.array([[1.0], [0.0], [9.0], [np.nan]])
    assert loss(Task("y", "number"), np.zeros((4, 1)), target) == pytest.approx(1.0)


def test_hazards_are_the_discrete_likelihood_of_bin_and_event():
    task, logits = Task("os", "nll", bins=4), rng.normal(size=(4, 4)).astype(np.float32)
    target = np.array([[0, 1], [3, 0], [1, 1], [2, 1]])
    each = survival.discrete_nll(
        jnp.asarray(logits), jnp.asarray(target[:, 0]), jnp.asarray(target[:, 1])
    )
    assert loss(task, logits, target) == pytest.approx(float((each * WEIGHT).sum()), rel=1e-5)
    sooner, later = np.array([[3.0, 0, 0, 0], [-3.0, -3, -3, 0]])
    assert task.predict(np.stack([sooner, later]))[0] > task.predict(np.stack([sooner, later]))[1]


def test_cox_takes_the_batch_for_its_risk_set():
    """Two deaths and one lost after the first: -(log of each one's share of those still there)."""
    task, logits = Task("os", "cox"), np.array([[0.3], [-0.2], [5.0], [0.1]])
    target = np.array([[2.0, 1], [5.0, 1], [1.0, 1], [3.0, 0]])
    weight = np.array([1.0, 1.0, 0.0, 1.0])  # the third is padding
    risk = np.exp([0.3, -0.2, 0.1])
    expected = -np.log(risk[0] / risk.sum()) - np.log(risk[1] / risk[1])
    assert loss(task, logits, target, weight) == pytest.approx(expected, rel=1e-5)


def test_several_tasks_stand_side_by_side():
    tasks = Tasks((Task("os", "nll", bins=3), Task("y", "classes", ("a", "b"))))
    logits, target = rng.normal(size=(4, 5)), np.array([[0, 1, 1], [2, 0, 0], [1, 1, 1], [1, 0, 0]])
    weights = np.stack([WEIGHT, WEIGHT[::-1]], 1)
    parts = loss(tasks.each[0], logits[:, :3], target[:, :2], weights[:, 0])
    parts += loss(tasks.each[1], logits[:, 3:], target[:, 2:], weights[:, 1])
    found = tasks.loss(*(jnp.asarray(x, jnp.float32) for x in (logits, target, weights)))
    assert float(found) == pytest.approx(parts, rel=1e-5)
    assert (tasks.outputs, tasks.width) == (5, 3)
    np.testing.assert_array_equal(tasks.label(jnp.asarray(target)), 3 + target[:, 2])


def test_a_head_that_needs_a_class_is_refused_without_one():
    tasks = Tasks((Task("os", "cox"),))
    assert tasks.classes is None
    with pytest.raises(UserError, match="no task with classes among os"):
        tasks.label(jnp.zeros((1, 2)))
