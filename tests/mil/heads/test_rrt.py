"""R²T-MIL: the contract, its regions, EPEG on queries, and a task the mean cannot solve."""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.mil.heads.rrt import RRT, layout
from pathme_jax.mil.heads.square import SequenceConv

contract: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("contract.py")))
)
planted: Any = types.SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))

SMALL: dict[str, Any] = dict(outputs=3, hidden=8, heads=2, attention=4, regions=2, epeg=3)
TestRRT = contract.checks(lambda: RRT(**SMALL), ordered=True)


def test_padding_that_makes_room_for_larger_regions_changes_nothing():
    head = RRT(**SMALL)
    params = contract.parameters(head)
    padded = contract.scattered(contract.bag(), 90, np.arange(21) * 4)
    found, expected = (contract.answer(head, params, given) for given in (padded, contract.bag()))
    contract.close(found.logits, expected.logits)


@pytest.mark.parametrize("count", [1, 5, 30, 60])
def test_every_instance_has_one_place_in_one_region(count):
    mask = np.zeros(60, bool)
    mask[np.random.default_rng(count).permutation(60)[:count]] = True
    rows, real, place = (np.asarray(x) for x in layout(jnp.asarray(mask), 3))
    assert sorted(rows[real]) == np.flatnonzero(mask).tolist()
    assert (rows.ravel()[place[mask]] == np.flatnonzero(mask)).all()


def test_regions_are_squares_of_the_instances_laid_out_row_by_row():
    rows, real, _ = layout(jnp.ones(16, bool), 2)
    assert real.all()
    assert np.asarray(rows).tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_convolving_queries_is_convolving_scores():
    """EPEG of Tang et al.: each column of the scores of a head is convolved with the head's kernel."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 2, 9, 4)).astype(np.float32)  # (heads, t, w) each
    kernel = rng.normal(size=(2, 5))
    params = {"kernel": kernel.T[:, None].astype(np.float32)}
    found = SequenceConv(5).apply({"params": params}, jnp.asarray(q)) @ k.swapaxes(1, 2)
    scores = np.float64(q @ k.swapaxes(1, 2))
    expected = [
        [np.correlate(column, kernel[h], "same") for column in scores[h].T] for h in range(2)
    ]
    np.testing.assert_allclose(found, np.swapaxes(expected, 1, 2), atol=1e-4)


def test_learns_whether_a_kind_keeps_together_which_the_mean_cannot():
    train, test = (planted.clustered(64, side=6, seed=seed) for seed in (0, 1))
    assert planted.of_mean(train, test) < 0.6
    assert (
        planted.of_head(
            RRT(1, hidden=16, heads=2, attention=8, regions=3, epeg=3),
            train,
            test,
            steps=25,
            rate=2e-2,
        )
        > 0.9
    )
