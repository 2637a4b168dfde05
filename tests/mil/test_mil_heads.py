"""Gated ABMIL: the published equations, blind to padding and order."""

import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.mil.heads import ABMIL, absorb


def head_and_bag(m=7, d=5, seed=0):
    head = ABMIL(classes=3, hidden=6, attention=4)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, d)).astype(np.float32)
    params = head.init(jax.random.key(seed), x, np.ones(m, bool))["params"]
    # Biases start at zero, which would hide a missing one.
    params = jax.tree.map(lambda p: p + rng.normal(size=p.shape).astype(np.float32) * 0.3, params)
    return head, params, x


def numpy_abmil(params, x):
    """Ilse et al. 2018, eq. 8 and 9, in float64."""

    def dense(name, v):
        return v @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])

    h = np.maximum(dense("embed", x), 0)
    gated = np.tanh(dense("tanh", h)) / (1 + np.exp(-dense("gate", h)))
    logit = dense("attend", gated)[:, 0]
    a = np.exp(logit - logit.max())
    a /= a.sum()
    return dense("classify", a @ h), a


def test_agrees_with_a_numpy_transcription():
    head, params, x = head_and_bag()
    logits, a = head.apply({"params": params}, x, np.ones(len(x), bool))
    expected, expected_a = numpy_abmil(params, x)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(a, expected_a, atol=1e-5)


def test_padding_changes_nothing_whatever_it_holds():
    head, params, x = head_and_bag()
    logits, a = head.apply({"params": params}, x, np.ones(len(x), bool))
    padded = np.concatenate([x, np.full((5, 5), 1e3, np.float32)])
    mask = np.arange(12) < 7
    padded_logits, padded_a = head.apply({"params": params}, padded, mask)
    np.testing.assert_allclose(padded_logits, logits, atol=1e-6)
    np.testing.assert_allclose(padded_a[:7], a, atol=1e-6)
    assert (np.asarray(padded_a[7:]) == 0).all()


def test_order_does_not_matter():
    head, params, x = head_and_bag()
    order = np.random.default_rng(1).permutation(len(x))
    logits, a = head.apply({"params": params}, x, np.ones(7, bool))
    shuffled_logits, shuffled_a = head.apply({"params": params}, x[order], np.ones(7, bool))
    np.testing.assert_allclose(shuffled_logits, logits, atol=1e-6)
    np.testing.assert_allclose(shuffled_a, a[order], atol=1e-6)


def test_leading_batch_dimensions():
    head, params, x = head_and_bag()
    batch, mask = np.stack([x, x[::-1]]), np.ones((2, 7), bool)
    logits, a = head.apply({"params": params}, batch, mask)
    assert logits.shape == (2, 3) and a.shape == (2, 7)
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)


def test_absorbing_the_standardisation_is_standardising():
    head, params, x = head_and_bag()
    mean, std = jnp.asarray(x.mean(0) + 3), jnp.asarray(x.std(0) * 2)
    mask = np.ones(7, bool)
    expected, _ = head.apply({"params": params}, (x - mean) / std, mask)
    found, _ = head.apply({"params": absorb(params, mean, std)}, x, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)
