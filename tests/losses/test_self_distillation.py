"""The self-distillation losses against NumPy transcriptions of METHODS 1.2, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathme_jax.losses import self_distillation as ssl

sinkhorn = jax.jit(ssl.sinkhorn)


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
    ours = sinkhorn(logits, temperature, jnp.ones(rows))
    np.testing.assert_allclose(ours, _sinkhorn(logits, temperature), atol=1e-5)


def test_sinkhorn_gives_every_sample_mass_1_and_every_prototype_nearly_the_same_mass():
    ours = np.asarray(sinkhorn(_random(1, 64, 8), 0.5, jnp.ones(64)))
    np.testing.assert_allclose(ours.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(ours.sum(0), 64 / 8, rtol=0.1)  # three iterations


def test_sinkhorn_survives_logits_that_overflow_exp():
    """exp(8 / 0.07) is 4e49, beyond fp32; the answer is unchanged by it, row and column sums hold."""
    logits = _random(2, 12, 6)
    logits[3, 2] = 8.0
    ours = sinkhorn(logits, 0.07, jnp.ones(12))
    np.testing.assert_allclose(ours, _sinkhorn(logits, 0.07), atol=1e-4)
    shifted = ssl.sinkhorn(logits - 1000.0, 1.0, jnp.ones(12))
    np.testing.assert_allclose(shifted, ssl.sinkhorn(logits, 1.0, jnp.ones(12)), atol=1e-3)


def test_sinkhorn_padding_rows_take_no_part_and_get_no_mass():
    logits, pad = _random(3, 10, 5), np.array([0, 3, 9])
    weight = np.ones(10, np.float32)
    weight[pad] = 0
    logits[pad] = 500.0  # would win everything if it counted
    ours = np.asarray(sinkhorn(logits, 0.5, weight))
    real = np.setdiff1d(np.arange(10), pad)
    np.testing.assert_allclose(ours[real], _sinkhorn(logits[real], 0.5), atol=1e-5)
    assert (ours[pad] == 0).all()


def test_sinkhorn_of_padding_alone_is_zero_not_nan():
    """Every masked token of a batch may lie on glass."""
    assert (np.asarray(sinkhorn(_random(4, 4, 5), 0.07, jnp.zeros(4))) == 0).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1000.0]),
    share=st.floats(0, 1),
    temperature=st.sampled_from([0.04, 1.0]),
)
def test_sinkhorn_whatever_the_logits(seed, scale, share, temperature):
    """Finite, rows of mass 1, padding of 0, and no row's answer depends on where it stands."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(16, 4)).astype(np.float32) * scale
    weight = (rng.random(16) < share).astype(np.float32)
    ours = np.asarray(sinkhorn(logits, temperature, weight))
    # fp32 has 7 digits: of logits / temperature in the thousands, three are left after the point
    exact = 1e-5 + 1e-6 * np.abs(logits).max() / temperature
    np.testing.assert_allclose(ours.sum(1), weight, atol=exact)
    order, swap = rng.permutation(16), rng.permutation(4)
    again = sinkhorn(logits[order][:, swap], temperature, weight[order])
    np.testing.assert_allclose(again, ours[order][:, swap], atol=exact)


def test_sinkhorn_spreads_a_batch_that_one_prototype_would_take():
    """One prototype wins every row by far: the balanced assignment still spreads the batch."""
    logits = _random(20, 64, 4)
    logits[:, 1] += 5
    many = np.asarray(ssl.sinkhorn(logits, 1.0, jnp.ones(64), iterations=50))
    np.testing.assert_allclose(many.sum(0), 16, rtol=1e-3)
    assert (np.asarray(jax.nn.softmax(logits)).sum(0)[1]) > 55


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
    assert (np.asarray(ssl.cross_entropy(student, 0 * teacher)) == 0).all()  # padding's targets
    # Student = teacher: the analytic minimum is the teacher's entropy, where the gradient vanishes.
    same = 0.1 * np.log(teacher)
    own = -(teacher * np.log(teacher)).sum(-1)
    np.testing.assert_allclose(ssl.cross_entropy(same, teacher), own, atol=1e-5)
    slope = jax.grad(lambda s: ssl.cross_entropy(s, teacher).sum())(jnp.asarray(same))
    np.testing.assert_allclose(slope, 0, atol=1e-5)


def test_cross_entropy_keeps_no_copy_of_the_logits_for_its_gradient():
    """At 65,536 prototypes a copy in fp32 is a gigabyte for each 4,096 tokens."""
    student = jnp.asarray(_random(28, 16, 32)).astype(jnp.bfloat16)
    teacher = jax.nn.softmax(_random(29, 16, 32))
    _, backwards = jax.vjp(ssl.cross_entropy, student, teacher)
    kept = [x for x in jax.tree.leaves(backwards) if x.size == student.size]
    assert sorted(x.dtype.name for x in kept) == ["bfloat16", "float32"]  # the arguments alone


def test_dino_and_ibot_of_a_batch():
    """METHODS 1.2 with loops: pairs of different views over 2 + 2 n_local; patches 1 / #masked, over
    images."""
    teacher, student, centre = _random(21, 2, 3, 7), _random(22, 4, 3, 7), _random(23, 7)
    target = _softmax((teacher.astype(np.float64) - centre) / 0.05)
    prediction = _log_softmax(student.astype(np.float64) / 0.1)
    pairs = [(i, j) for i in range(4) for j in range(2) if i != j]
    expected = -sum((target[j] * prediction[i]).sum(-1).mean() for i, j in pairs) / (2 + 2 * 2)
    ours = [
        ssl.cross_entropy(student[i], ssl.centred_softmax(teacher[j], centre, 0.05)).mean()
        for i, j in pairs
    ]
    np.testing.assert_allclose(sum(ours) / len(pairs), expected, rtol=1e-5)

    image = np.array([0, 0, 0, 2, 2, 3])  # of each masked patch; image 1 has none
    teacher, student = _random(24, 6, 7), _random(25, 6, 7)
    target = _sinkhorn(teacher, 0.05)
    each = -(target * _log_softmax(student.astype(np.float64) / 0.1)).sum(-1)
    expected = sum(each[image == i].mean() for i in (0, 2, 3)) / 4
    weight = 1 / np.bincount(image)[image]
    found = ssl.assign("sinkhorn", teacher, jnp.zeros(7), 0.05, weight)
    ours = (ssl.cross_entropy(student, found) * weight).sum() / 4
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


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
    slope = np.asarray(jax.jit(jax.grad(ssl.koleo))(jnp.asarray(x)))
    for i, j in ((0, 0), (2, 1), (4, 2)):
        up, down = x.astype(np.float64), x.astype(np.float64)
        up[i, j] += 1e-5
        down[i, j] -= 1e-5
        expected = (_koleo(up) - _koleo(down)) / 2e-5
        np.testing.assert_allclose(slope[i, j], expected, rtol=1e-3, atol=1e-4)


def test_koleo_of_duplicates_is_finite_and_so_is_its_gradient():
    x = jnp.asarray(np.repeat(_random(15, 3, 4), 2, axis=0))
    value, slope = jax.jit(jax.value_and_grad(ssl.koleo))(x)
    assert 15 < float(value) < 20  # -log(1e-8) = 18.4, or a rounding error's distance
    assert np.isfinite(np.asarray(slope)).all()


def test_koleo_pushes_samples_apart():
    x = jnp.asarray(_random(16, 6, 3))
    moved = x - 0.01 * jax.grad(ssl.koleo)(x)
    assert ssl.koleo(moved) < ssl.koleo(x)


def _kde(x: np.ndarray, kappa: float) -> float:
    x = x.astype(np.float64)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    others = ~np.eye(len(x), dtype=bool)
    rows = [np.exp(kappa * x[others[i]] @ x[i]).mean() for i in range(len(x))]
    return float(np.log(rows).mean())


@pytest.mark.parametrize(("scale", "kappa"), [(1e-2, 5.0), (100.0, 5.0), (1.0, 200.0)])
def test_kde_is_the_log_mean_kernel_to_the_other_samples(scale, kappa):
    x = _random(17, 9, 5, scale=scale)
    np.testing.assert_allclose(ssl.kde(x, kappa), _kde(x, kappa), rtol=1e-5, atol=1e-5)


def test_kde_of_duplicates_is_at_most_kappa_with_a_small_gradient_where_koleo_diverges():
    same = jnp.asarray(np.repeat(_random(18, 1, 4), 6, axis=0))
    pairs = jnp.asarray(np.repeat(_random(19, 3, 4), 2, axis=0))
    np.testing.assert_allclose(ssl.kde(same), 5, atol=1e-4)
    slope_of = jax.jit(jax.value_and_grad(ssl.kde))
    for x in (same, pairs, pairs.at[0].set(pairs[1] * (1 + 1e-6))):
        value, slope = slope_of(x)
        assert float(value) <= 5 + 1e-4
        assert np.abs(np.asarray(slope)).max() < 5
    apart = pairs.at[::2].add(1e-4)
    steep = np.abs(np.asarray(jax.jit(jax.grad(ssl.koleo))(apart))).max()
    assert steep > 100 * np.abs(np.asarray(slope_of(apart)[1])).max()


@pytest.mark.parametrize("spread", [ssl.koleo, ssl.kde])
def test_a_feature_of_zeros_has_a_finite_gradient(spread):
    value, slope = jax.jit(jax.value_and_grad(spread))(
        jnp.asarray(_random(26, 5, 4)).at[2].set(0.0)
    )
    assert np.isfinite(float(value)) and np.isfinite(np.asarray(slope)).all()


@pytest.mark.parametrize("spread", [ssl.koleo, ssl.kde])
def test_one_sample_has_no_neighbour(spread):
    with pytest.raises(ValueError, match="two or more"):
        spread(jnp.ones((1, 4)))


@pytest.mark.parametrize(
    "of",
    [
        lambda x: ssl.sinkhorn(x, 0.05, jnp.ones(6)),
        lambda x: ssl.centred_softmax(x, jnp.full(8, 0.1), 0.05),
        lambda x: ssl.moved_centre(jnp.full(8, 0.1), x, jnp.ones(6)),
        lambda x: ssl.cross_entropy(x, jax.nn.softmax(jnp.arange(48.0).reshape(6, 8) % 5)),
        ssl.koleo,
        ssl.kde,
    ],
    ids=["sinkhorn", "centred_softmax", "moved_centre", "cross_entropy", "koleo", "kde"],
)
def test_bfloat16_goes_in_and_float32_arithmetic_comes_out(of):
    x = jnp.asarray(_random(27, 6, 8)).astype(jnp.bfloat16)
    ours = jax.jit(of)(x)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, jax.jit(of)(x.astype(jnp.float32)), rtol=1e-6, atol=1e-6)


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
