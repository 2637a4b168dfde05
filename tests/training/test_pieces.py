"""The trainer's parts, each against its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from pathme_jax.errors import UserError
from pathme_jax.training import optimiser
from pathme_jax.training.contract import load_method, resolve
from pathme_jax.training.keys import sample_keys
from pathme_jax.training.schedules import cosine, linear
from pathme_jax.training.sharding import make_mesh, place


def test_cosine_schedule_meets_its_corners():
    value = cosine(4e-3, 1e-6, 100, warmup=10)
    at = np.array([value(jnp.array(s)) for s in (0, 5, 10, 55, 100, 200)])
    np.testing.assert_allclose(
        at, [0, 2e-3, 4e-3, (4e-3 + 1e-6) / 2, 1e-6, 1e-6], rtol=1e-4, atol=1e-8
    )


def test_linear_schedule_stays_at_its_end():
    value = linear(0.04, 0.07, 30)
    np.testing.assert_allclose(
        [value(jnp.array(s)) for s in (0, 15, 30, 99)], [0.04, 0.055, 0.07, 0.07]
    )


def test_a_samples_key_does_not_depend_on_its_place_in_the_batch():
    one = sample_keys(0, "views", jnp.arange(8, dtype=jnp.uint32))
    other = sample_keys(0, "views", jnp.array([7, 3], jnp.uint32))
    assert (jax.random.key_data(one)[jnp.array([7, 3])] == jax.random.key_data(other)).all()
    assert (
        jax.random.key_data(sample_keys(0, "loss", jnp.arange(8, dtype=jnp.uint32)))
        != jax.random.key_data(one)
    ).any()


def settings(**changes) -> ConfigDict:
    return ConfigDict(
        {
            "lr": 1e-2,
            "end_lr": 1e-2,
            "warmup": 0,
            "weight_decay": 0.1,
            "end_weight_decay": 0.1,
            "b1": 0.9,
            "b2": 0.999,
            "clip": 1e9,
            "lr_multipliers": ((".*", 1.0),),
            "decay_multipliers": ((".*", 1.0),),
            **changes,
        }
    )


def test_adamw_agrees_with_optax():
    """Twenty steps of our update and of optax.adamw on the same gradients."""
    key = jax.random.key(0)
    weights = {"a/b/kernel": jax.random.normal(key, (4, 3)), "a/c/bias": jnp.ones(3)}
    init, update = optimiser.make(settings(), 100, list(weights))
    theirs = optax.adamw(1e-2, 0.9, 0.999, weight_decay=0.1)
    mine, state, expected, other = weights, init(weights), weights, theirs.init(weights)
    for step in range(20):
        grads = {
            p: jax.random.normal(jax.random.fold_in(key, step), x.shape) for p, x in mine.items()
        }
        mine, state, _ = update(grads, state, mine, jnp.array(step))
        moves, other = theirs.update(grads, other, expected)
        expected = optax.apply_updates(expected, moves)
    for path in weights:
        np.testing.assert_allclose(mine[path], expected[path], rtol=1e-5, atol=1e-6)


def test_multipliers_freeze_and_spare_by_path():
    weights = {"x/y/kernel": jnp.ones(2), "x/y/bias": jnp.ones(2)}
    rules = {
        "lr_multipliers": ((".*kernel", 0.0), (".*", 1.0)),
        "decay_multipliers": ((".*bias", 0.0), (".*", 1.0)),
    }
    init, update = optimiser.make(settings(**rules), 10, list(weights))
    new, _, _ = update({p: jnp.zeros(2) for p in weights}, init(weights), weights, jnp.array(0))
    assert (new["x/y/kernel"] == 1).all() and (new["x/y/bias"] == 1).all()
    new, _, _ = update({p: jnp.ones(2) for p in weights}, init(weights), weights, jnp.array(0))
    assert (new["x/y/kernel"] == 1).all() and (new["x/y/bias"] < 1).all()


def test_clipping_is_per_submodule():
    """A large gradient in one submodule leaves the others alone, unlike global clipping."""
    grads = {
        "student/head/a": jnp.full(4, 100.0),
        "student/head/b": jnp.zeros(1),
        "student/backbone/a": jnp.full(4, 0.1),
    }
    clipped = optimiser.clip_per_submodule(grads, 3.0)
    assert float(jnp.linalg.norm(clipped["student/head/a"])) == pytest.approx(3.0)
    np.testing.assert_array_equal(clipped["student/backbone/a"], grads["student/backbone/a"])


def test_the_update_clips_before_its_moments():
    weights = {"student/head/a": jnp.zeros(4)}
    init, update = optimiser.make(settings(clip=3.0), 10, list(weights))
    grads = {"student/head/a": jnp.full(4, 100.0)}
    _, state, metrics = update(grads, init(weights), weights, jnp.array(0))
    assert float(jnp.linalg.norm(state.mu["student/head/a"])) == pytest.approx(0.1 * 3.0, rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(200.0)  # logged as it was


def test_a_parameter_no_rule_covers_is_named():
    with pytest.raises(UserError, match="teacher/x"):
        resolve([("student/.*", 1.0)], ["student/x", "teacher/x"], "lr")


def test_fsdp_shards_the_largest_dimension_the_mesh_divides():
    shapes = {"a": jax.ShapeDtypeStruct((3, 8), jnp.float32)}
    mesh = make_mesh()
    assert place(shapes, [(".*", "fsdp")], mesh)["a"].spec == jax.sharding.PartitionSpec(
        None, "data"
    )
    assert place(shapes, [(".*", "replicate")], mesh)["a"].spec == jax.sharding.PartitionSpec()
    with pytest.raises(UserError, match="tensor"):
        place(shapes, [(".*", "tensor")], mesh)


def test_a_method_that_cannot_be_imported_is_named():
    with pytest.raises(UserError, match="no_such"):
        load_method(ConfigDict({"method": "no_such.module:Thing"}))
