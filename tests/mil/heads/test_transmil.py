"""TransMIL: against torchmil and the authors' attention (tests/references/make_mil_b.py)."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.mil.heads import transmil
from pathme_jax.mil.heads.square import largest_side, side_of
from pathme_jax.mil.heads.transmil import TransMIL

contract: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("contract.py")))
)
reference: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "references" / "make_mil_b.py"))
)

SMALL: dict[str, Any] = dict(outputs=3, hidden=8, heads=2, landmarks=4, residual_width=5)
TestTransMIL = contract.checks(lambda: TransMIL(**SMALL), ordered=True)


@pytest.mark.parametrize("case", ["transmil", "transmil_torchmil"])
@pytest.mark.parametrize("length", reference.LENGTHS)
def test_agrees_with_torchmil_also_among_padding(case, length):
    places = np.arange(length) + np.arange(length) // 3
    given = contract.scattered(reference.bag(length), 60, places)
    head, params = reference.HEADS[case], reference.parameters(case)
    expected = reference.answers(case, length)
    found = contract.answer(head, params, given)
    contract.close(found.logits, expected["logits"])
    if length == 36:  # a full square: no instance is repeated
        attention = np.maximum(expected["attention"], 0)
        contract.close(found.attention[0, places], attention / attention.sum())


def test_a_repeated_instance_has_the_attention_of_both_its_places():
    """Two instances fill a square of four places, so that copies of them are those instances again."""
    head = TransMIL(**SMALL)
    params = contract.parameters(head)
    two = contract.bag(2)
    four = contract.reordered(two, np.array([0, 1, 0, 1]))
    found, spread = (contract.answer(head, params, bag) for bag in (two, four))
    contract.close(found.logits, spread.logits)
    contract.close(found.attention[0], spread.attention[0, :2] + spread.attention[0, 2:])


def test_heads_of_a_large_bag_take_turns_with_the_same_answer_and_gradient(monkeypatch):
    head = TransMIL(**SMALL)
    params, given = contract.parameters(head), contract.bag(21)

    found = []
    for large in (transmil.LARGE, 0):
        monkeypatch.setattr(transmil, "LARGE", large)

        def loss(params):
            out = head.apply({"params": params}, given)
            return (out.logits**2).sum(), out

        found.append(jax.tree.leaves(jax.jit(jax.grad(loss, has_aux=True))(params)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


SHARED = """
import sys, runpy, types
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from pathme_jax.mil.heads import transmil
from pathme_jax.mil.population import mesh_of

contract = types.SimpleNamespace(**runpy.run_path(sys.argv[1]))
transmil.LARGE = 0
head = transmil.TransMIL(3, hidden=8, heads=2, landmarks=4, residual_width=5)
params, bag = contract.parameters(head), contract.bag(24)
assert jax.device_count() == 4
shared = jax.device_put(bag, NamedSharding(mesh_of(4), P("instances")))
contract.close(contract.answer(head, params, shared), contract.answer(head, params, bag))
one, four = (contract.gradients(head, params, each) for each in (bag, shared))
contract.close(four, one, 1e-4)
print("same")
"""


def test_heads_take_turns_on_a_bag_shared_by_four_devices():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", SHARED, str(Path(__file__).with_name("contract.py"))]
    done = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_the_side_of_the_square_is_exact():
    counts = np.arange(1, 200_001)
    expected = np.array([largest_side(count) for count in counts.tolist()])
    np.testing.assert_array_equal(side_of(jnp.asarray(counts, jnp.int32)), expected)
    assert (expected**2 >= counts).all() and ((expected - 1) ** 2 < counts).all()
