"""Transformer with 2-D ALiBi: against torch's layers (tests/references/make_mil_b.py), block by block."""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pathme_jax.mil.heads.transformer import Transformer, slopes

contract: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("contract.py")))
)
reference: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[2] / "references" / "make_mil_b.py"))
)

SMALL: dict[str, Any] = dict(outputs=3, hidden=8, heads=2)
TestTransformer = contract.checks(lambda: Transformer(**SMALL, block=6))


@pytest.mark.parametrize("block", [1024, 7])
@pytest.mark.parametrize("length", reference.LENGTHS)
def test_agrees_with_torch(length, block):
    head = reference.HEADS["transformer"].clone(block=block)
    params = reference.parameters("transformer")
    found = contract.answer(head, params, reference.bag(length))
    contract.close(
        {"logits": found.logits, "attention": found.attention},
        reference.answers("transformer", length),
    )


def test_blocks_change_neither_answers_nor_gradients():
    bag = contract.scattered(contract.bag(), 32, np.arange(21) + np.arange(21) // 2)
    params = contract.parameters(Transformer(**SMALL))

    def loss(params, block):
        return Transformer(**SMALL, block=block).apply({"params": params}, bag).logits[1]

    plain, blocked = (jax.jit(jax.grad(loss), static_argnums=1)(params, b) for b in (100, 7))
    contract.close(blocked, plain)


def test_no_matrix_of_all_pairs_is_held():
    m = 4096
    head = Transformer(**SMALL, block=256)
    bag = contract.bag(m)
    params = contract.parameters(head)
    gradient = jax.jit(jax.grad(lambda p: head.apply({"params": p}, bag).logits[0]))
    held = gradient.lower(params).compile().memory_analysis().temp_size_in_bytes
    assert held < m * m * 4 / 2


def test_where_the_slide_lies_does_not_matter_and_how_far_its_tiles_are_apart_does():
    head, bag = Transformer(**SMALL), contract.bag()
    params = contract.parameters(head)
    expected = contract.answer(head, params, bag).logits
    moved = contract.answer(head, params, bag.replace(cells=bag.cells + 17)).logits
    stretched = contract.answer(head, params, bag.replace(cells=bag.cells * 3)).logits
    contract.close(moved, expected)
    assert np.abs(stretched - expected).max() > 1e-3


def test_twelve_heads_have_the_slopes_of_eight_and_every_other_of_sixteen():
    expected = [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    np.testing.assert_allclose(slopes(12), expected, rtol=1e-6)
