"""What the heads share: the masked softmax, and the standardisation taken into the first layer."""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.mil.heads.common import TURNED, absorb, masked_softmax, product
from pathme_jax.mil.heads.dsmil import DSMIL
from pathme_jax.mil.heads.pooling import MaxPool, MeanPool

contract: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("contract.py")))
)


@pytest.mark.parametrize("offset", [0.0, -1e4, 1e4])
def test_softmax_sees_instances_alone_however_padding_scores(offset):
    scores = jnp.array([1.0, 0.0, 2.0, 0.0]) + jnp.array([offset, 0, offset, 0])
    found = masked_softmax(scores, jnp.array([True, False, True, False]))
    one = 1 / (1 + np.exp(1.0))
    np.testing.assert_allclose(found, [one, 0, 1 - one, 0], atol=1e-6)


def test_softmax_of_no_instances_is_zero_and_so_is_its_gradient():
    scores, mask = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.array([[False, False], [True, True]])
    found = masked_softmax(scores, mask)
    np.testing.assert_allclose(found.sum(1), [0, 1], atol=1e-6)
    gradient = jax.grad(lambda s: (masked_softmax(s, mask) ** 2).sum())(scores)
    assert np.isfinite(gradient).all() and not gradient[0].any() and gradient[1].all()


@pytest.mark.parametrize(
    "head", [MeanPool(3, embed=(6, 4)), MeanPool(3, embed=()), MaxPool(3, embed=()), DSMIL(3, (6,))]
)
def test_absorbing_the_standardisation_is_standardising(head):
    bag, params = contract.bag(), contract.parameters(head)
    mean, std = bag.features.mean(0) + 3, bag.features.std(0) * 2
    standard = bag.replace(features=(bag.features - mean) / std)
    expected = contract.answer(head, params, standard)
    contract.close(contract.answer(head, absorb(params, mean, std), bag), expected)


def test_a_head_with_no_first_layer_to_absorb_into_is_refused():
    params = contract.parameters(DSMIL(3, embed=()))
    with pytest.raises(UserError, match="embed"):
        absorb(params, jnp.zeros(contract.WIDTH), jnp.ones(contract.WIDTH))


@pytest.mark.parametrize("turned", [False, True])
def test_the_gradient_of_a_product_is_jax_own(turned):
    """Also of members mapped over one bag, and where xᵀ is given."""
    rng = np.random.default_rng(0)
    x, kernels, g = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((7, 5), (3, 5, 4), (3, 7, 4))
    )

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return product(x, kernel, x.T if turned else None)

    own, jaxs = (
        jax.vmap(lambda k, g, f=f: jax.vjp(f, x, k)[1](g))(kernels, g) for f in (ours, jnp.matmul)
    )
    for found, expected in zip(own, jaxs, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("instances", [7, TURNED])
def test_the_gradients_of_embedding_layers_are_those_of_their_formula(instances):
    """relu(relu(x W + b) W' + b'), small bags and those large enough to be turned."""
    head = MeanPool(2, embed=(6, 4))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(instances, 5)), jnp.float32)
    bag = contract.Bag(x, jnp.ones(instances, bool), jnp.zeros((instances, 2), jnp.int32))
    params = head.init(jax.random.key(0), bag)["params"]

    def formula(params: Any) -> jax.Array:
        h = x
        for name in ("embed", "embed_1"):
            h = jax.nn.relu(h @ params[name]["kernel"] + params[name]["bias"])
        return (h.mean(0) @ params["classify"]["kernel"] + params["classify"]["bias"]).sum()

    expected = jax.grad(formula)(params)
    found = jax.grad(lambda p: head.apply({"params": p}, bag).logits.sum())(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(expected))
