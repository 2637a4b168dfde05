"""The self-distillation losses against NumPy transcriptions of METHODS 1.2, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.losses import self_distillation as ssl


def _random(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _sinkhorn(logits: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """METHODS 1.2 (b), word for word, over real rows only and with the global maximum taken off."""
    scaled = np.asarray(logits, np.float64) / temperature
    q = np.exp(scaled - scaled.max()).T
    k, b = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdims=True) / k
        q = q / q.sum(0, keepdims=True) / b
    return (q * b).T


@pytest.mark.parametrize(("rows", "prototypes"), [(24, 8), (6, 16)])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_sinkhorn_is_the_three_step_iteration(rows, prototypes, temperature):
    logits = _random(0, rows, prototypes, scale=0.4)
    ours = ssl.sinkhorn(logits, temperature, jnp.ones(rows))
    np.testing.assert_allclose(ours, _sinkhorn(logits, temperature), atol=1e-5)


def test_sinkhorn_gives_every_sample_mass_1_and_every_prototype_nearly_the_same_mass():
    ours = np.asarray(ssl.sinkhorn(_random(1, 64, 8), 0.5, jnp.ones(64)))
    np.testing.assert_allclose(ours.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(ours.sum(0), 64 / 8, rtol=0.1)  # three iterations


def test_sinkhorn_survives_logits_that_overflow_exp():
    """exp(8 / 0.07) is 4e49, beyond fp32; the answer is unchanged by it, row and column sums hold."""
    logits = _random(2, 12, 6)
    logits[3, 2] = 8.0
    ours = ssl.sinkhorn(logits, 0.07, jnp.ones(12))
    np.testing.assert_allclose(ours, _sinkhorn(logits, 0.07), atol=1e-4)
    shifted = ssl.sinkhorn(logits - 1000.0, 1.0, jnp.ones(12))
    np.testing.assert_allclose(shifted, ssl.sinkhorn(logits, 1.0, jnp.ones(12)), atol=1e-3)


def test_sinkhorn_padding_rows_take_no_part_and_get_no_mass():
    logits, pad = _random(3, 10, 5), np.array([0, 3, 9])
    weight = np.ones(10, np.float32)
    weight[pad] = 0
    logits[pad] = 500.0  # would win everything if it counted
    ours = np.asarray(ssl.sinkhorn(logits, 0.5, weight))
    real = np.setdiff1d(np.arange(10), pad)
    np.testing.assert_allclose(ours[real], _sinkhorn(logits[real], 0.5), atol=1e-5)
    assert (ours[pad] == 0).all()


def test_sinkhorn_of_padding_alone_is_zero_not_nan():
    """Every masked token of a batch may lie on glass."""
    assert (np.asarray(ssl.sinkhorn(_random(4, 4, 5), 0.07, jnp.zeros(4))) == 0).all()


def test_centring_subtracts_the_centre_before_the_temperature():
    logits, centre = _random(5, 7, 9), _random(6, 9)
    expected = _softmax((logits - centre) / 0.07)
    np.testing.assert_allclose(ssl.centred_softmax(logits, centre, 0.07), expected, atol=1e-5)


def test_centre_is_an_ema_of_the_weighted_batch_mean():
    logits, centre, weight = _random(7, 6, 4), _random(8, 4), np.array([1, 1, 0, 1, 0, 1.0])
    expected = 0.9 * centre + 0.1 * logits[weight > 0].mean(0)
    np.testing.assert_allclose(ssl.moved_centre(centre, logits, weight), expected, atol=1e-6)


def test_centre_stays_where_no_row_counts():
    centre = _random(9, 4)
    np.testing.assert_array_equal(ssl.moved_centre(centre, _random(10, 3, 4), jnp.zeros(3)), centre)


def test_cross_entropy_and_its_minimum():
    student, teacher = _random(11, 5, 8), _softmax(_random(12, 5, 8))
    expected = -(teacher * _log_softmax(student / 0.1)).sum(-1)
    np.testing.assert_allclose(ssl.cross_entropy(student, teacher), expected, rtol=1e-5)
    # Student = teacher: the analytic minimum is the teacher's entropy, where the gradient vanishes.
    same = 0.1 * np.log(teacher)
    own = -(teacher * np.log(teacher)).sum(-1)
    np.testing.assert_allclose(ssl.cross_entropy(same, teacher), own, atol=1e-5)
    slope = jax.grad(lambda s: ssl.cross_entropy(s, teacher).sum())(jnp.asarray(same))
    np.testing.assert_allclose(slope, 0, atol=1e-5)


def _koleo(x: np.ndarray) -> float:
    x = x.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1) + np.diag(np.full(len(x), np.inf))
    return -np.log(distance.min(1) + 1e-8).mean()


@pytest.mark.parametrize("scale", [1e-2, 1.0, 100.0])
def test_koleo_is_the_distance_to_the_nearest_other_sample_on_the_sphere(scale):
    x = _random(13, 9, 5, scale=scale)
    np.testing.assert_allclose(ssl.koleo(x), _koleo(x), rtol=1e-5)


def test_koleo_gradient_is_that_of_finite_differences():
    x = _random(14, 5, 3)
    slope = np.asarray(jax.grad(ssl.koleo)(jnp.asarray(x)))
    for i, j in ((0, 0), (2, 1), (4, 2)):
        up, down = x.astype(np.float64), x.astype(np.float64)
        up[i, j] += 1e-5
        down[i, j] -= 1e-5
        expected = (_koleo(up) - _koleo(down)) / 2e-5
        np.testing.assert_allclose(slope[i, j], expected, rtol=1e-3, atol=1e-4)


def test_koleo_of_duplicates_is_finite_and_so_is_its_gradient():
    x = jnp.asarray(np.repeat(_random(15, 3, 4), 2, axis=0))
    value, slope = jax.value_and_grad(ssl.koleo)(x)
    assert 15 < float(value) < 20  # -log(1e-8) = 18.4, or a rounding error's distance
    assert np.isfinite(np.asarray(slope)).all()


def test_koleo_pushes_samples_apart():
    x = jnp.asarray(_random(16, 6, 3))
    moved = x - 0.01 * jax.grad(ssl.koleo)(x)
    assert ssl.koleo(moved) < ssl.koleo(x)


def test_entropy_and_usage_tell_a_collapse_from_a_spread():
    one = np.eye(4, dtype=np.float32)[[2, 2, 2, 2]]
    each = np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(ssl.entropy(np.full((3, 4), 0.25)), np.log(4), atol=1e-5)
    np.testing.assert_allclose(ssl.entropy(each), 0, atol=1e-5)
    np.testing.assert_allclose(ssl.usage(one, jnp.ones(4)), 0, atol=1e-5)
    np.testing.assert_allclose(ssl.usage(each, jnp.ones(4)), 1, atol=1e-5)
    # rows without weight do not count
    np.testing.assert_allclose(
        ssl.usage(each, jnp.array([1.0, 1, 0, 0])), np.log(2) / np.log(4), atol=1e-5
    )
