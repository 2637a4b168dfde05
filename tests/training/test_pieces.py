"""The trainer's parts, each against its definition."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs.dinov2 import get_config as full_recipe
from pathme_jax.errors import UserError
from pathme_jax.training import optimiser
from pathme_jax.training.contract import flat, load_method, resolve
from pathme_jax.training.keys import sample_keys
from pathme_jax.training.schedules import cosine, linear


def test_cosine_schedule_meets_its_corners():
    value = cosine(4e-3, 1e-6, 100, warmup=10)
    at = np.array([value(jnp.array(s)) for s in (0, 5, 10, 55, 100, 200)])
    np.testing.assert_allclose(
        at, [0, 2e-3, 4e-3, (4e-3 + 1e-6) / 2, 1e-6, 1e-6], rtol=1e-4, atol=1e-8
    )


def test_schedules_are_dinov2s_at_every_step():
    """Transcribed: linear warm-up from 0, then a cosine over what is left, as arrays over all steps."""
    steps, warmup, base, final = 200, 20, 4e-3, 1e-6
    rise = np.linspace(0, base, warmup, endpoint=False)
    left = np.arange(steps - warmup)
    fall = final + 0.5 * (base - final) * (1 + np.cos(np.pi * left / len(left)))
    ours = jax.vmap(cosine(base, final, steps, warmup))(jnp.arange(steps))
    np.testing.assert_allclose(ours, np.concatenate([rise, fall]), rtol=1e-5, atol=1e-9)


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
    init, update = optimiser.make(settings(), 100, weights)
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
    init, update = optimiser.make(settings(**rules), 10, weights)
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
    init, update = optimiser.make(settings(clip=3.0), 10, weights)
    grads = {"student/head/a": jnp.full(4, 100.0)}
    _, state, metrics = update(grads, init(weights), weights, jnp.array(0))
    assert float(jnp.linalg.norm(state.mu["student/head/a"])) == pytest.approx(0.1 * 3.0, rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(200.0)  # logged as it was


def test_a_parameter_no_rule_covers_is_named():
    with pytest.raises(UserError, match="teacher/x"):
        resolve([("student/.*", 1.0)], ["student/x", "teacher/x"], "lr")


def dinov2_rates() -> dict:
    """Learning-rate multipliers of ViT-L/16 by configs/dinov2.py."""
    config = full_recipe("L/16")
    method = load_method(config)
    params, _ = jax.eval_shape(lambda: method.init(jax.random.key(0), {}))
    shapes = {p: x for p, x in flat(params).items() if p.startswith("student")}
    return optimiser.rates(config.optimiser, shapes)


def test_layer_wise_decay_is_dinov2s():
    """METHODS 1.2: 0.9^(depth + 1 - layer), embeddings and tokens at layer 0, patch embedding x 0.2 more,
    heads and the last norm 1; no decay of biases, norms, LayerScale; prototypes frozen for an epoch."""
    rate = dinov2_rates()
    d = 24
    block = "student/backbone/blocks/layers/block"
    np.testing.assert_allclose(
        np.squeeze(rate[f"{block}/mlp/up/kernel"]["lr"]),
        [0.9 ** (d + 1 - layer) for layer in range(1, d + 1)],
        rtol=1e-6,
    )
    assert rate[f"{block}/mlp/up/kernel"]["lr"].shape == (24, 1, 1)
    for token in ("cls_token", "mask_token", "positions", "registers"):
        assert rate[f"student/backbone/{token}"]["lr"] == pytest.approx(0.9 ** (d + 1))
    assert rate["student/backbone/patch_embed/kernel"]["lr"] == pytest.approx(0.2 * 0.9 ** (d + 1))
    for path in ("student/backbone/norm/scale", "student/dino/dense_0/kernel"):
        assert rate[path]["lr"] == 1.0
    spared = [p for p, r in rate.items() if r["decay"] == 0.0]
    assert all(re.search("bias|scale|norm", p) for p in spared)
    assert {f"{block}/scale_mlp", f"{block}/attention/qkv/bias"} <= set(spared)
    assert f"{block}/attention/qkv/kernel" not in spared
    assert {p: r["frozen_until"] for p, r in rate.items() if r["frozen_until"]} == {
        "student/dino/prototypes": 1250
    }


def test_the_last_layer_is_frozen_then_moves_and_each_layer_moves_at_its_rate():
    weights = {"s/h/prototypes": jnp.ones(3), "s/b/layers/w": jnp.ones((2, 3))}
    rules = {
        "frozen_until": ((".*prototypes", 4), (".*", 0)),
        "layers": ((".*layers.*", "each"), (".*", "last")),
        "layer_decay": 0.5,
    }
    init, update = optimiser.make(settings(weight_decay=0.0, **rules), 10, weights)
    grads, state, before = jax.tree.map(jnp.ones_like, weights), init(weights), weights
    for step in range(6):
        after, state, _ = update(grads, state, before, jnp.array(step))
        moved = {p: np.asarray(before[p] - after[p]) for p in weights}
        assert (moved["s/h/prototypes"] == 0).all() == (step < 4)
        low, high = moved["s/b/layers/w"]
        np.testing.assert_allclose(high, 2 * low, rtol=1e-3)
        before = after


def test_the_learning_rate_grows_with_the_root_of_the_batch():
    weights = {"a/b/w": jnp.ones(2)}
    rate = {}
    for samples in (1024, 4096):
        init, update = optimiser.make(settings(lr_samples=1024), 10, weights, samples)
        _, _, metrics = update(weights, init(weights), weights, jnp.array(0))
        rate[samples] = float(metrics["lr"])
    assert rate[1024] == pytest.approx(1e-2) and rate[4096] == pytest.approx(2e-2)


def test_a_misspelt_path_or_kind_of_layer_is_refused():
    rules = (("a/b/k.*", 0.5), (".*", 1.0))
    with pytest.raises(UserError, match=r"lr rule 'a/b/k.*' matches no parameter"):
        optimiser.rates(settings(lr_multipliers=rules), {"a/b/c": jnp.ones(1)})
    with pytest.raises(UserError, match="frist"):
        optimiser.rates(settings(layers=((".*", "frist"),)), {"a/b/c": jnp.ones(1)})


EIGHT = """
import jax
jax.config.update("jax_platforms", "cpu"); jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from pathme_jax.errors import UserError
from pathme_jax.training.sharding import make_mesh, place

assert dict(make_mesh({"data": -1, "fsdp": 4}).shape) == {"data": 2, "fsdp": 4, "prototypes": 1}
assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "prototypes": 1}
for wrong, said in (({"data": 3}, "does not make 8"), ({"model": 8}, "'model'"), ({"fsdp": -1, "data": 3}, "8")):
    try:
        make_mesh(wrong)
    except UserError as error:
        assert said in str(error), error
    else:
        raise AssertionError(wrong)

mesh = make_mesh({"data": 2, "fsdp": 2, "prototypes": 2})
shapes = {"a": jax.ShapeDtypeStruct((3, 8), jnp.float32), "b": jax.ShapeDtypeStruct((3,), jnp.float32)}
cut = place(shapes, [(".*", "fsdp")], mesh)
assert cut["a"].spec == P(None, "fsdp") and cut["b"].spec == P()
assert place(shapes, [(".*", "replicate")], mesh)["a"].spec == P()
last = place({"a": shapes["a"]}, [(".*", "prototypes")], mesh)["a"]
assert last.shard_shape((3, 8)) == (3, 2)
for rule, said in (("tensor", "tensor"), ("prototypes", "does not divide")):
    try:
        place({"b": shapes["b"]}, [(".*", rule)], mesh)
    except UserError as error:
        assert said in str(error), error
    else:
        raise AssertionError(rule)
"""


def test_meshes_and_sharding_rules():
    """On eight devices: sizes with -1, the largest dimension, prototypes, and what is refused."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", EIGHT], env=env, check=True)


def test_a_method_that_cannot_be_imported_is_named():
    with pytest.raises(UserError, match="no_such"):
        load_method(ConfigDict({"method": "no_such.module:Thing"}))
