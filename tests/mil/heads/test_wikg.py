"""WiKG: the contract, the search for neighbours, and a task the mean cannot solve."""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.mil.heads.wikg import WiKG, nearest

contract: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("contract.py")))
)
planted: Any = types.SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))

SMALL: dict[str, Any] = dict(outputs=3, hidden=8, neighbours=3, block=8)
TestWiKG = contract.checks(lambda: WiKG(**SMALL))


@pytest.mark.parametrize("block", [4, 100])
def test_neighbours_are_the_largest_products_among_the_instances(block):
    rng = np.random.default_rng(0)
    head, tail = rng.normal(size=(2, 11, 4)).astype(np.float32)
    mask = rng.random(11) < 0.7
    index, real = nearest(jnp.asarray(head), jnp.asarray(tail), jnp.asarray(mask), 3, block)
    expected = np.argsort(-np.where(mask, head @ tail.T, -np.inf), 1)[:, :3]
    np.testing.assert_array_equal(index, expected)
    assert real.all()


def test_fewer_instances_than_neighbours_are_all_that_count():
    mask = jnp.arange(9) < 2
    x = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32)
    index, real = nearest(x, x, mask, 6, 100)
    assert (np.asarray(real).sum(1) == 2).all()
    assert (np.sort(np.asarray(index)[:, :2], 1) == [0, 1]).all()


def test_learns_which_kinds_meet_which_the_mean_cannot():
    train, test = (planted.conjunction(128, side=6, seed=seed) for seed in (0, 1))
    assert planted.of_mean(train, test) < 0.6
    assert (
        planted.of_head(WiKG(1, hidden=16, neighbours=3), train, test, steps=100, rate=2e-2) > 0.9
    )
