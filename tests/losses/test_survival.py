"""Survival losses agree with references, and padding is nothing to them."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.losses.survival import cox, discrete_nll, discrete_risk, survival

REFERENCES = Path(__file__).parents[1] / "references"
_SPEC = importlib.util.spec_from_file_location("make_survival", REFERENCES / "make_survival.py")
make = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(make)
STORED = json.loads((REFERENCES / "survival.json").read_text())


@pytest.mark.parametrize("name", make.COHORTS)
def test_cox_is_the_breslow_likelihood_of_scikit_survival(name):
    c = make.cohort(name)
    found = cox(*(jnp.asarray(c[k]) for k in ("risk", "time", "event")), jnp.ones(120))
    np.testing.assert_allclose(found, STORED[name]["cox_nll_per_event"], rtol=2e-6)


def test_cox_does_not_see_padding_wherever_it_is_and_whatever_it_holds():
    c = make.cohort("tied")
    rng = np.random.default_rng(0)
    slots = np.sort(rng.permutation(150)[:120])
    padded = {k: np.full(150, np.nan, np.float32) for k in ("risk", "time", "event")}
    for k in padded:
        padded[k][slots] = c[k]
    weight = np.zeros(150, np.float32)
    weight[slots] = 1

    def loss(risk, time, event, weight):
        return cox(jnp.asarray(risk, jnp.float32), jnp.asarray(time), jnp.asarray(event), weight)

    a, ga = jax.jit(jax.value_and_grad(loss))(
        jnp.asarray(c["risk"]), c["time"], c["event"], jnp.ones(120)
    )
    b, gb = jax.jit(jax.value_and_grad(loss))(
        jnp.asarray(padded["risk"]), padded["time"], padded["event"], weight
    )
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(gb[slots], ga, atol=1e-6)
    assert np.all(np.delete(np.asarray(gb), slots) == 0)


@pytest.mark.parametrize("weight", [np.zeros(120), np.ones(120)])
def test_a_batch_without_events_has_no_loss_and_no_gradient(weight):
    c = make.cohort("plain")
    value, gradient = jax.jit(jax.value_and_grad(cox))(
        jnp.asarray(c["risk"]), c["time"], np.zeros(120, int), jnp.asarray(weight)
    )
    assert value == 0 and np.all(np.asarray(gradient) == 0)


def test_large_risks_keep_cox_finite():
    c = make.cohort("plain")
    value, gradient = jax.jit(jax.value_and_grad(cox))(
        jnp.asarray(c["risk"]) * 1e4, c["time"], c["event"], jnp.ones(120)
    )
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_a_weight_of_two_is_the_row_twice():
    c = make.cohort("plain")  # no ties, so that Breslow's rule for the doubled rows is exact
    weight = np.ones(120)
    weight[:40] = 2
    twice = np.concatenate([np.arange(120), np.arange(40)])
    a = cox(*(jnp.asarray(c[k]) for k in ("risk", "time", "event")), jnp.asarray(weight))
    b = cox(*(jnp.asarray(c[k][twice]) for k in ("risk", "time", "event")), jnp.ones(160))
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_discrete_likelihood_is_hazards_and_survival_written_out(alpha):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(16, 4)) * 2
    bins, event = rng.integers(0, 4, 16), rng.integers(0, 2, 16)
    expected = []
    for x, y, e in zip(logits, bins, event, strict=True):
        hazard = 1 / (1 + np.exp(-x))
        alive = np.concatenate([[1.0], np.cumprod(1 - hazard)])
        uncensored = -np.log(alive[y]) - np.log(hazard[y]) if e else 0.0
        censored = 0.0 if e else -np.log(alive[y + 1])
        expected.append((1 - alpha) * (censored + uncensored) + alpha * uncensored)
    found = discrete_nll(jnp.asarray(logits), jnp.asarray(bins), jnp.asarray(event), alpha)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_extreme_logits_keep_the_discrete_likelihood_finite():
    logits = jnp.array([[1e4, -1e4, 1e4, -1e4]] * 8)
    bins, event = jnp.arange(8) % 4, jnp.arange(8) // 4
    gradient = jax.grad(lambda x: discrete_nll(x, bins, event).sum())(logits)
    assert np.all(np.isfinite(discrete_nll(logits, bins, event))) and np.all(np.isfinite(gradient))


def test_higher_hazards_are_a_higher_risk():
    low, high = jnp.full((4,), -2.0), jnp.array([-2.0, 1.0, -2.0, -2.0])
    assert discrete_risk(high) > discrete_risk(low)
    np.testing.assert_allclose(survival(jnp.zeros(3)), [0.5, 0.25, 0.125], rtol=1e-6)
