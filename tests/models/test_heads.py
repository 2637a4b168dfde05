"""DINO's projection head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.models.heads import PrototypeHead, unit


def test_logits_are_cosines_with_the_prototypes():
    """L2-normalised bottleneck, weight-normalised prototypes with g = 1, no bias (METHODS 1.2)."""
    head = PrototypeHead(prototypes=7, hidden=6, bottleneck=5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    params = jax.jit(head.init)(jax.random.key(0), x)["params"]
    logits = np.asarray(head.apply({"params": params}, x))
    assert logits.shape == (4, 7) and (np.abs(logits) <= 1 + 1e-5).all()
    scaled = {**params, "prototypes": params["prototypes"] * jnp.arange(1.0, 8.0)}
    np.testing.assert_allclose(head.apply({"params": scaled}, x), logits, atol=1e-5)
    assert set(params) == {
        "dense_0",
        "dense_1",
        "bottleneck",
        "prototypes",
    }  # three layers, one linear


def test_unit_has_a_finite_gradient_at_zero():
    slope = jax.grad(lambda x: unit(x).sum())(jnp.zeros(4))
    assert np.isfinite(np.asarray(slope)).all()
    np.testing.assert_allclose(jnp.linalg.norm(unit(jnp.array([3.0, 4.0]))), 1, rtol=1e-6)


def test_half_precision_logits_are_summed_in_float32():
    """Products in bfloat16, sums and both normalisations not: a cosine of many terms keeps its digits."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
    full, half = (
        PrototypeHead(prototypes=16, hidden=8, bottleneck=512, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    params = jax.jit(full.init)(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = jax.jit(half.apply)(params, x)
    assert out.dtype == jnp.float32
    assert (out != out.astype(jnp.bfloat16).astype(jnp.float32)).any()  # finer than bfloat16
    np.testing.assert_allclose(out, full.apply(params, x), atol=0.01)
