"""Mean and max pooling."""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pathme_jax.mil.heads.pooling import MaxPool, MeanPool

contract: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("contract.py")))
)

TestMean = contract.checks(lambda: MeanPool(3, embed=(6,)))
TestMax = contract.checks(lambda: MaxPool(3, embed=(6,)))
TestLinearProbe = contract.checks(lambda: MeanPool(3, embed=()))


def test_mean_without_an_embedding_is_linear_in_the_mean_feature():
    head, bag = MeanPool(3, embed=()), contract.bag()
    params = contract.parameters(head)
    padded = contract.scattered(bag, 30, np.arange(21) + 4)
    expected = np.mean(bag.features, 0) @ params["classify"]["kernel"] + params["classify"]["bias"]
    np.testing.assert_allclose(contract.answer(head, params, padded).logits, expected, atol=1e-5)


def test_max_takes_each_features_largest_value_even_below_zero():
    head, bag = MaxPool(3, embed=()), contract.bag()
    bag = bag.replace(features=bag.features - 10)  # padding is zero, hence larger
    params = contract.parameters(head)
    padded = contract.scattered(bag, 30, np.arange(21) + 4)
    expected = np.max(bag.features, 0) @ params["classify"]["kernel"] + params["classify"]["bias"]
    np.testing.assert_allclose(contract.answer(head, params, padded).logits, expected, atol=1e-4)


def test_attention_of_max_is_the_share_of_features_led_and_ties_share():
    head = MaxPool(2, embed=())
    features = jnp.array([[9.0, 0, 0, 5], [1, 7, 0, 5], [0, 0, 0, 5]])
    bag = contract.Bag(features, jnp.ones(3, bool), jnp.zeros((3, 2), jnp.int32))
    params = contract.parameters(head, width=4)
    shares = contract.answer(head, params, bag).attention[0] * 4
    np.testing.assert_allclose(shares, [1 + 2 / 3, 1 + 2 / 3, 2 / 3], atol=1e-6)
