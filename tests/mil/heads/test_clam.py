"""CLAM-SB against torchmil's, CLAM-MB and the instance loss against the authors' steps in NumPy."""

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
from pathme_jax.mil.heads import CLAM_MB, CLAM_SB
from pathme_jax.mil.heads.clam import most_and_least

contract: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("contract.py")))
)
reference: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "references" / "make_mil_a.py"))
)

SMALL: dict[str, Any] = dict(outputs=3, embed=(6,), attention=4)
TestSingleBranch = contract.checks(lambda: CLAM_SB(**SMALL))
TestBranchPerClass = contract.checks(lambda: CLAM_MB(**SMALL, subtyping=True))


@pytest.mark.parametrize("case", ["clam_sb_ce", "clam_sb_svm"])
def test_agrees_with_torchmil(case):
    head = CLAM_SB(**reference.CLAM[case])
    out = contract.answer(head, reference.parameters(head), reference.bag())
    answers = reference.answers(case)
    contract.close(out.logits, answers["logits"])
    contract.close(out.attention, answers["attention"])
    # torchmil adds the losses of its two classes up; the authors take the mean.
    losses = np.array([head.extra(out, label) for label in (0, 1)])
    contract.close(losses, 0.3 * answers["instance_loss"] / 2)


def numpy_clam(params, features, label, *, per_class, subtyping, k=8, classes=3):
    """The bag's logits and the instance loss (smooth SVM), a class after the other, in float64."""

    def weights(name):
        return np.float64(params[name]["kernel"]), np.float64(params[name].get("bias", 0))

    def dense(name, x):
        kernel, bias = weights(name)
        return x @ kernel + bias

    h = np.maximum(dense("embed", np.float64(features)), 0)
    scores = dense("attend", np.tanh(dense("tanh", h)) / (1 + np.exp(-dense("gate", h)))).T
    logits, loss = np.zeros(classes), 0.0
    for c in range(classes):
        score = scores[c] if per_class else scores[0]
        a = np.exp(score) / np.exp(score).sum()
        kernel, bias = weights("classify")
        logits[c] = a @ h @ kernel[:, c] + bias[c]

        kernel, bias = weights("instances")
        two_way = h @ kernel[:, 2 * c : 2 * c + 2] + bias[2 * c : 2 * c + 2]
        order = np.argsort(-score)
        said = [(i, 1) for i in order[:k]] + [(i, 0) for i in order[::-1][:k]]
        if c != label:
            said = [(i, 0) for i in order[:k]] if subtyping else []
        each = [
            np.log(sum(np.exp(two_way[i, j] + (j != y) - two_way[i, y]) for j in (0, 1)))
            for i, y in said
        ]
        loss += np.mean(each) if each else 0
    return logits, loss / (classes if subtyping else 1)


@pytest.mark.parametrize("make", [CLAM_SB, CLAM_MB])
@pytest.mark.parametrize("subtyping", [False, True])
def test_agrees_with_the_authors_steps(make, subtyping):
    head, bag = make(**SMALL, subtyping=subtyping), contract.bag()
    params = contract.parameters(head)
    padded = contract.scattered(bag, 32, np.arange(21) + np.arange(21) // 2)
    out = contract.answer(head, params, padded)
    for label in range(3):
        logits, loss = numpy_clam(
            params, bag.features, label, per_class=make is CLAM_MB, subtyping=subtyping
        )
        contract.close(out.logits, logits)
        contract.close(head.extra(out, label), 0.3 * loss)
        contract.close(jax.jit(head.extra)(out, jnp.int32(label)), 0.3 * loss)
    assert [weight for weight, _ in out.streams] == [0.7]


def test_a_small_bag_takes_no_instance_from_both_ends():
    scores = jnp.array([[3.0, 9, 1, 4, 1, 5, 9, 2], [-1, -2, -3, -4, -5, -6, -7, -8]])
    mask = jnp.array([1, 0, 1, 1, 0, 1, 0, 1], bool)
    ends, counted = most_and_least(scores, mask, 8)
    assert counted.tolist() == [True, True, *[False] * 6]
    assert ends[:, :, :2].tolist() == [[[5, 3], [2, 7]], [[0, 2], [7, 5]]]


def test_the_instance_loss_of_a_small_bag_is_the_mean_over_what_is_taken():
    head, bag = CLAM_SB(**SMALL, instances=2), contract.bag(5)
    params = contract.parameters(head)
    padded = contract.scattered(bag, 32, np.arange(5))
    eight = CLAM_SB(**SMALL, instances=8)  # of which two can be taken
    expected, found = (one.extra(contract.answer(one, params, padded), 1) for one in (head, eight))
    contract.close(found, expected)


def test_a_bag_of_one_instance_has_no_instance_loss():
    head = CLAM_SB(**SMALL)
    out = contract.answer(head, contract.parameters(head), contract.bag(1))
    assert head.extra(out, 1) == 0


def test_the_instance_loss_does_not_train_the_attention():
    head, bag = CLAM_MB(**SMALL, subtyping=True), contract.bag()
    params = contract.parameters(head)
    gradient = jax.grad(lambda p: head.extra(contract.answer(head, p, bag), 1))(params)
    moved = {name for name, leaves in gradient.items() if np.any(leaves["kernel"])}
    assert moved == {"embed", "instances"}


def test_an_unknown_instance_loss_is_refused():
    head = CLAM_SB(**SMALL, instance_loss="hinge")
    out = contract.answer(head, contract.parameters(head), contract.bag())
    with pytest.raises(UserError, match="'hinge' is none of svm, ce"):
        head.extra(out, 1)
