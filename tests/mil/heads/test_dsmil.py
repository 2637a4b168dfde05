"""DSMIL against torchmil's with one class, and the authors' equations in NumPy with several."""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pathme_jax.mil.heads.dsmil import DSMIL

contract: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("contract.py")))
)
reference: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "references" / "make_mil_a.py"))
)

SMALL: dict[str, Any] = dict(outputs=3, embed=(6,), attention=4)
TestContract = contract.checks(lambda: DSMIL(**SMALL))


def test_agrees_with_torchmil():
    head = DSMIL(**reference.DSMIL["dsmil"])
    out = contract.answer(head, reference.parameters(head), reference.bag())
    answers = reference.answers("dsmil")
    contract.close(out.attention, answers["attention"])
    contract.close(out.streams, ((0.5, answers["bag"]), (0.5, answers["max"])))
    contract.close(out.logits, answers["logits"])


def numpy_dsmil(params, features):
    """Values of every instance, and the convolution over classes as a sum, in float64."""

    def dense(name, x):
        return x @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])

    h = np.maximum(dense("embed", np.float64(features)), 0)
    scores, q, v = dense("score", h), dense("query", h), dense("value", h)
    bag = np.zeros((3, 6))
    for c in range(3):
        likeness = q @ q[scores[:, c].argmax()] / 2  # the square root of 4 columns
        bag[c] = np.exp(likeness) / np.exp(likeness).sum() @ v
    kernel = np.float64(params["classify"]["kernel"]).reshape(3, 6, 3)  # class in, feature, class
    return np.einsum("ch,cho->o", bag, kernel) + params["classify"]["bias"], scores.max(0)


def test_several_classes_agree_with_the_equations():
    head, bag = DSMIL(**SMALL), contract.bag()
    params = contract.parameters(head)
    out = contract.answer(head, params, bag)
    pooled, highest = numpy_dsmil(params, bag.features)
    contract.close(out.streams, ((0.5, pooled), (0.5, highest)))
    contract.close(out.logits, (pooled + highest) / 2)


def test_the_critical_instance_is_never_padding():
    head, bag = DSMIL(**SMALL), contract.bag()
    params = contract.parameters(head)
    # A score of zero features, all that padding has, would win against these.
    params["score"]["bias"] = jnp.full(3, -50.0)
    params["score"]["kernel"] = -jnp.abs(params["score"]["kernel"])
    params["embed"]["bias"] = -jnp.abs(params["embed"]["bias"])
    padded = contract.scattered(bag, 32, np.arange(21) + 5)
    expected, found = (contract.answer(head, params, given) for given in (bag, padded))
    contract.close(found.streams, expected.streams)
    contract.close(found.attention[:, 5:26], expected.attention)
