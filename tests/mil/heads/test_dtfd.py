"""DTFD-MIL: against torchmil (tests/references/make_mil_b.py) and a transcription of the distillation."""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.mil.heads.dtfd import DTFD

contract: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("contract.py")))
)
reference: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "references" / "make_mil_b.py"))
)

SMALL: dict[str, Any] = dict(outputs=3, hidden=8, attention=4, groups=4)
TestDTFD = contract.checks(lambda: DTFD(**SMALL), ordered=True)


@pytest.mark.parametrize("case", ["dtfd_afs", "dtfd_max"])
@pytest.mark.parametrize("length", reference.LENGTHS)
def test_agrees_with_torchmil(case, length):
    expected = reference.answers(case, length)
    params = reference.parameters(case)
    found = reference.HEADS[case].apply({"params": params}, reference.bag(length))
    contract.close(found.logits, expected["logits"])
    contract.close(np.array([logits[0] for _, logits in found.streams[1:]]), expected["tier_1"])


def scores(params: Any, h: np.ndarray) -> np.ndarray:
    """Softmax of gated attention over the rows of h."""
    tanh, gate = (h @ params[name]["kernel"] + params[name]["bias"] for name in ("tanh", "gate"))
    logits = ((np.tanh(tanh) / (1 + np.exp(-gate))) @ params["attend"]["kernel"])[:, 0]
    return np.exp(logits) / np.exp(logits).sum()


@pytest.mark.parametrize(("distill", "ends"), [("MaxMinS", [0, -1]), ("MaxS", [-1])])
def test_tier_2_sees_the_most_and_least_probable_of_each_pseudo_bag(distill, ends):
    head = DTFD(**{**SMALL, "outputs": 2}, distill=distill)
    params = jax.tree.map(np.float64, contract.parameters(head))
    params["attention_1"]["attend"]["kernel"] *= 20  # so that the weights decide who is chosen
    bag = contract.bag()
    h = np.maximum(bag.features @ params["embed"]["kernel"] + params["embed"]["bias"], 0)
    distilled = []
    for g in range(4):
        part = h[g::4]
        s = scores(params["attention_1"], part)[:, None] * (part @ params["classify_1"]["kernel"])
        order = np.argsort(s[:, 1] - s[:, 0])  # as the probability of the last class
        distilled.append(part[order[ends]])
    f = np.concatenate(distilled)
    expected = scores(params["attention_2"], f) @ f @ params["classify"]["kernel"]
    found = head.apply({"params": params}, bag)
    contract.close(found.logits, expected + params["classify"]["bias"])


def test_training_splits_at_random_into_pseudo_bags_of_equal_size():
    head = DTFD(**SMALL)
    mask = np.arange(40) % 2 == 0
    splits = [
        np.asarray(
            head.apply({}, mask, True, method="_split", rngs={"split": jax.random.key(seed)})
        )
        for seed in (0, 1)
    ]
    for split in splits:
        assert (split.sum(0) == mask).all()
        assert (split.sum(1) == 5).all()
    assert (splits[0] != splits[1]).any()


def test_the_loss_is_seven_tenths_tier_2_and_the_rest_shared_by_the_pseudo_bags_there_are():
    head = DTFD(**SMALL)
    params = contract.parameters(head)
    weights = [float(w) for w, _ in head.apply({"params": params}, contract.bag(3)).streams]
    np.testing.assert_allclose(weights, [0.7, 0.1, 0.1, 0.1, 0])


def test_an_unknown_distillation_is_refused():
    with pytest.raises(UserError, match="MaxMinS, MaxS, AFS"):
        DTFD(**SMALL, distill="max").init(jax.random.key(0), contract.bag())
