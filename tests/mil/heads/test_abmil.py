"""ABMIL: plain, gated, several heads; against torchmil's (tests/references/make_mil_a.py)."""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pathme_jax.mil.heads.abmil import ABMIL

contract: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("contract.py")))
)
reference: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "references" / "make_mil_a.py"))
)

SMALL: dict[str, Any] = dict(outputs=3, embed=(6,), attention=4)
TestPlain = contract.checks(lambda: ABMIL(**SMALL, gated=False))
TestGatedWithTwoHeads = contract.checks(lambda: ABMIL(**SMALL, heads=2))


@pytest.mark.parametrize("case", ["abmil", "abmil_gated"])
def test_agrees_with_torchmil(case):
    head = ABMIL(**reference.ABMIL[case])
    out = contract.answer(head, reference.parameters(head), reference.bag())
    answers = reference.answers(case)
    contract.close(out.logits, answers["logits"])
    contract.close(out.attention, answers["attention"])


def test_heads_share_the_branches_and_are_classified_side_by_side():
    head, bag = ABMIL(**SMALL, heads=2), contract.bag()
    params = contract.parameters(head)
    both = contract.answer(head, params, bag)
    logits = params["classify"]["bias"]
    for i in range(2):
        one = {**params, "attend": {"kernel": params["attend"]["kernel"][:, i : i + 1]}}
        one["classify"] = {
            "kernel": params["classify"]["kernel"][6 * i : 6 * i + 6],
            "bias": np.zeros(3, np.float32),
        }
        alone = ABMIL(**SMALL).apply({"params": one}, bag)
        contract.close(both.attention[i], alone.attention[0])
        logits = logits + alone.logits
    contract.close(both.logits, logits)


def test_the_papers_network_for_musk_has_its_layers():
    head = ABMIL(1, embed=(256, 128, 64), attention=64, gated=False)
    shapes = jax.eval_shape(head.init, jax.random.key(0), contract.bag(3, width=166))["params"]
    kernels = {name: leaves["kernel"].shape for name, leaves in shapes.items()}
    assert kernels == {
        "embed": (166, 256),
        "embed_1": (256, 128),
        "embed_2": (128, 64),
        "tanh": (64, 64),
        "attend": (64, 1),
        "classify": (64, 1),
    }


def test_dropout_acts_in_training_alone():
    head, bag = ABMIL(**SMALL), contract.bag()
    params = contract.parameters(head)
    judged = contract.answer(head, params, bag).logits
    trained = head.apply({"params": params}, bag, train=True, rngs={"dropout": jax.random.key(0)})
    assert np.abs(trained.logits - judged).max() > 1e-3
