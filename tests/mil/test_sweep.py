"""Settings are chosen by what a fold validates on, and by nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.mil import sweep
from pathme_jax.mil.folds import TEST, TRAIN, VALIDATION
from pathme_jax.mil.population import Population
from pathme_jax.mil.settings import Settings
from pathme_jax.mil.tasks import Tasks


def test_every_combination_is_tried_and_the_rest_is_as_set():
    found = sweep.candidates(Settings(sweep="learning_rate=1e-4:1e-3,weight_decay=0:0.1"))
    assert [(c["learning_rate"], c["weight_decay"]) for c in found] == [
        (1e-4, 0), (1e-4, 0.1), (1e-3, 0), (1e-3, 0.1)
    ]  # fmt: skip
    one = sweep.candidates(Settings(weight_decay=0.5))
    assert one == [{"learning_rate": 1e-3, "weight_decay": 0.5}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs=1:2", "'epochs'"),
        ("learning_rate=1:2,learning_rate=3", "'learning_rate'"),
        ("learning_rate=fast", "learning_rate 'fast'"),
        ("learning_rate=0:1", "learning_rate '0'"),
        ("weight_decay=-1", "weight_decay '-1'"),
        ("learning_rate", "learning_rate ''"),
    ],
)
def test_what_is_not_understood_is_named(text, said):
    with pytest.raises(UserError, match=said):
        sweep.candidates(Settings(sweep=text))


def test_the_least_validation_loss_of_the_kept_epoch_chooses():
    """Three rows, three candidates, two seeds; the training loss and later epochs would choose otherwise."""
    none = [[np.nan, np.nan]] * 3
    losses = np.array([[[3, 3], [1, 2], [2, 2]], [[5, 5], [1, 1], [np.nan, 0]], none], float)
    history = np.full((18, 2, 2), 0.5)
    history[:, 0, 1], history[:, 1, 1] = losses.ravel(), -losses.ravel()
    fitted = Population(None, Tasks(()), {}, np.zeros((1, 18)), history, np.zeros(18, int))
    best, found = sweep.choose(fitted, 3, 3, 2)
    assert best.tolist() == [1, 1, 0]
    np.testing.assert_allclose(found, [[3, 1.5, 2], [5, 1, np.nan], [np.nan] * 3])


def test_a_fold_without_a_validation_part_is_named():
    parts = {
        "fold_0": np.array([TRAIN, VALIDATION, TEST]),
        "fold_1": np.array([VALIDATION, TRAIN, TEST]),
    }
    both = [np.array([[1.0], [np.nan], [0]]), np.array([[np.nan], [3.0], [0]])]
    sweep.check(parts, both)
    with pytest.raises(UserError, match="fold_0 has no validation part"):
        sweep.check(parts, both[:1])  # the one slide is not known
