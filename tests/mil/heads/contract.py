"""What every head promises, for the head tests beside this file.

    contract: Any = types.SimpleNamespace(**runpy.run_path(Path(__file__).with_name("contract.py")))
    TestContract = contract.checks(lambda: SomeHead(outputs=3, ...))     # a class that pytest collects

Heads are built small by the caller; no parameter has its initial value, since a bias of zero would hide a
missing one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.mil.heads.common import Bag, Out

WIDTH = 10
TOLERANCE = 1e-5


def bag(m: int = 21, seed: int = 0, width: int = WIDTH) -> Bag:
    """m instances, no padding, on distinct cells of a grid."""
    rng = np.random.default_rng(seed)
    cells = np.stack(np.unravel_index(rng.permutation(2 * m)[:m], (2, m)), 1)
    features = rng.normal(size=(m, width)).astype(np.float32)
    return Bag(jnp.asarray(features), jnp.ones(m, bool), jnp.asarray(cells, jnp.int32))


def scattered(short: Bag, m: int, places: np.ndarray) -> Bag:
    """The same instances at `places` of m rows; zeros elsewhere."""

    def put(values):
        return jnp.zeros((m, *values.shape[1:]), values.dtype).at[places].set(values)

    return Bag(put(short.features), put(short.mask), put(short.cells))


def reordered(given: Bag, order: np.ndarray) -> Bag:
    return jax.tree.map(lambda values: values[order], given)


def parameters(head: Any, seed: int = 0, width: int = WIDTH) -> Any:
    """Parameters of the head's shapes, as large as trained ones: columns of matrices of length one or so,
    scales around 1, the rest of order 0.3."""
    shapes = jax.eval_shape(head.init, jax.random.key(0), bag(width=width))["params"]
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        scale = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.3
        around = 1 if path[-1].key == "scale" else 0
        return (around + scale * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(drawn, shapes)


@functools.partial(jax.jit, static_argnums=0)
def answer(head: Any, params: Any, given: Bag) -> Out:
    return head.apply({"params": params}, given)


def close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Trees alike to `tolerance`, relative to the largest value where that is above one."""

    def leaf(a, b):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max(initial=0)))

    jax.tree.map(leaf, found, expected)


@functools.partial(jax.jit, static_argnums=0)
def gradients(head: Any, params: Any, given: Bag) -> Any:
    """Of a loss through all that a head is trained by (its streams, its own loss, dropout), by the parameters
    and by the features."""
    rngs = {"dropout": jax.random.key(1), "split": jax.random.key(2)}

    def loss(params, features):
        out = head.apply(
            {"params": params}, given.replace(features=features), train=True, rngs=rngs
        )
        total = sum(weight * -jax.nn.log_softmax(logits)[1] for weight, logits in out.streams)
        return total + (head.extra(out, 1) if hasattr(head, "extra") else 0)

    return jax.grad(loss, argnums=(0, 1))(params, given.features)


def finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def checks(make: Callable[[], Any], ordered: bool = False) -> type:
    """The checks, as a class that pytest collects under a name that starts with "Test".

    Args:
        make: builds the head, with 3 outputs and small sizes.
        ordered: the head minds the order of its instances, by design.
    """

    class TestContract:
        @pytest.fixture(scope="class")
        def head(self):
            return make()

        @pytest.fixture(scope="class")
        def params(self, head):
            return parameters(head)

        def test_answers_have_the_shapes_of_the_contract(self, head, params):
            out = answer(head, params, bag())
            assert out.logits.shape == (3,) and out.logits.dtype == jnp.float32
            assert out.attention.shape[1:] == (21,) and out.attention.dtype == jnp.float32
            assert all(logits.shape == (3,) for _, logits in out.streams)
            assert 0.5 < sum(weight for weight, _ in out.streams) < 1 + 1e-6

        def test_attention_is_a_distribution_over_the_instances(self, head, params):
            padded = scattered(bag(), 32, np.arange(21) + np.arange(21) // 2)
            attention = np.asarray(answer(head, params, padded).attention)
            assert (attention >= 0).all()
            assert (attention[:, ~np.asarray(padded.mask)] == 0).all()
            np.testing.assert_allclose(attention.sum(1), 1, atol=1e-5)

        @pytest.mark.parametrize("where", ["behind", "between"])
        def test_padding_changes_nothing(self, head, params, where):
            rows = np.arange(21) + (0 if where == "behind" else np.arange(21) // 2)
            short, padded = bag(), scattered(bag(), 32, rows)
            expected, found = (answer(head, params, given) for given in (short, padded))
            close(found.logits, expected.logits)
            close(found.streams, expected.streams)
            close(found.attention[:, rows], expected.attention)

        def test_what_padding_holds_changes_nothing(self, head, params):
            padded = scattered(bag(), 32, np.arange(21))
            dirty = padded.replace(
                features=jnp.where(padded.mask[:, None], padded.features, 1e3),
                cells=jnp.where(padded.mask[:, None], padded.cells, 7),
            )
            close(answer(head, params, dirty), answer(head, params, padded))

        def test_order_matters_only_where_meant(self, head, params):
            order = np.random.default_rng(1).permutation(21)
            expected = answer(head, params, bag())
            found = answer(head, params, reordered(bag(), order))
            if ordered:
                assert np.abs(found.logits - expected.logits).max() > 1e-4
            else:
                close(found.logits, expected.logits)
                close(found.attention, expected.attention[:, order])

        def test_every_instance_is_within_sight(self, head, params):
            """A head that ignores its input would pass all else."""
            one, other = (answer(head, params, bag(seed=seed)).logits for seed in (0, 1))
            assert np.abs(one - other).max() > 1e-4

        @pytest.mark.parametrize("instances", [0, 1, 3])
        def test_tiny_bags_have_finite_answers_and_gradients(self, head, params, instances):
            given = scattered(bag(instances), 8, np.arange(instances) * 2)
            assert finite(answer(head, params, given))
            assert finite(gradients(head, params, given))

        def test_gradients_are_finite_and_reach_every_parameter(self, head, params):
            padded = scattered(bag(), 32, np.arange(21) + np.arange(21) // 2)
            gradient, by_features = gradients(head, params, padded)
            assert finite(gradient)
            assert (np.asarray(by_features)[~np.asarray(padded.mask)] == 0).all()
            still = [
                jax.tree_util.keystr(path)
                for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
                if not np.any(leaf)
            ]
            assert not still

        def test_members_mapped_over_one_bag_answer_as_alone(self, head):
            padded = scattered(bag(), 32, np.arange(21))
            members = [parameters(head, seed) for seed in range(3)]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
            together = jax.jit(
                jax.vmap(lambda p, b: head.apply({"params": p}, b), in_axes=(0, None))
            )(stacked, padded)
            for i, params in enumerate(members):
                alone = answer(head, params, padded)
                close(together.logits[i], alone.logits)
                close(together.attention[i], alone.attention)

    return TestContract
