"""Feature matching against NumPy, and the rank that must show a collapse."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.losses.features import cosine_distance, effective_rank


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_cosine_distance_is_one_minus_the_mean_cosine_of_rows_that_count():
    x, y = _random(0, 2, 7, 5), _random(1, 2, 7, 5)
    weight = (np.random.default_rng(2).random((2, 7)) < 0.6).astype(np.float32)
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    expected = 1 - cosine[weight > 0].mean()
    np.testing.assert_allclose(cosine_distance(x, y, weight), expected, atol=1e-6)


def test_cosine_distance_ignores_length_and_what_stands_in_padding():
    x, y, weight = _random(3, 6, 4), _random(4, 6, 4), np.array([1, 1, 0, 1, 1, 0.0])
    other = x * 7.0
    other[weight == 0] = 1e6
    np.testing.assert_allclose(
        cosine_distance(x, y, weight), cosine_distance(other, y, weight), atol=1e-6
    )


def test_cosine_distance_is_zero_for_equal_rows_and_two_for_opposite_ones():
    x = _random(5, 6, 4)
    np.testing.assert_allclose(cosine_distance(x, x, jnp.ones(6)), 0, atol=1e-6)
    np.testing.assert_allclose(cosine_distance(x, -x, jnp.ones(6)), 2, atol=1e-6)


def test_cosine_distance_of_zero_rows_or_of_none_has_a_finite_gradient():
    x, y = jnp.zeros((3, 4)), jnp.asarray(_random(6, 3, 4))
    for weight in (jnp.ones(3), jnp.zeros(3)):
        value, slope = jax.value_and_grad(cosine_distance)(x, y, weight)
        assert np.isfinite(float(value)) and np.isfinite(np.asarray(slope)).all()


def _effective_rank(x: np.ndarray) -> float:
    spectrum = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64), bias=True))
    share = np.maximum(spectrum, 0) / spectrum.sum()
    share = share[share > 1e-12]
    return float(np.exp(-(share * np.log(share)).sum()))


def test_effective_rank_is_the_exponential_of_the_spectral_entropy():
    x = _random(7, 40, 6) * np.array([4, 2, 1, 1, 0.5, 0.1], np.float32) + 3
    np.testing.assert_allclose(effective_rank(x, jnp.ones(40)), _effective_rank(x), rtol=1e-4)


def test_effective_rank_lies_between_a_line_and_the_whole_space():
    line = _random(8, 50, 1) * _random(9, 1, 6)
    np.testing.assert_allclose(effective_rank(line, jnp.ones(50)), 1, atol=1e-3)
    np.testing.assert_allclose(effective_rank(jnp.ones((50, 6)), jnp.ones(50)), 1, atol=1e-3)
    round_ = np.concatenate([np.eye(6), -np.eye(6)])
    np.testing.assert_allclose(effective_rank(round_, jnp.ones(12)), 6, rtol=1e-4)


def test_effective_rank_leaves_out_rows_without_weight():
    x, weight = _random(10, 30, 5), (np.arange(30) % 3 > 0).astype(np.float32)
    expected = _effective_rank(x[weight > 0])
    x[weight == 0] = 1e4
    np.testing.assert_allclose(effective_rank(x, weight), expected, rtol=1e-3)
