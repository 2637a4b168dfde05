"""Losses for times to an event that some patients have not had when last seen (right censoring)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def discrete_nll(logits: Array, bins: Array, event: Array, alpha: float = 0.4) -> Array:
    """Negative log-likelihood of discrete hazards (Zadeh & Schmid 2021), one value a case.

    With hazards h = sigmoid(logits) and survival S_k = (1 - h_0) … (1 - h_k), S_-1 = 1, a case of bin y has

        event:     U = -log S_{y-1} - log h_y          censored:  C = -log S_y
        loss = (1 - alpha) (C + U) + alpha U,

    U and C being zero where they do not apply: censored cases weigh 1 - alpha.

    Args:
        logits: (..., b); bins: (...) int, the bin of the last time; event: (...) 1 if it happened then.

    Returns:
        (...), not reduced: padded rows are finite and may be weighed with zero.
    """
    logits = logits.astype(jnp.float32)
    survived = jnp.cumsum(jax.nn.log_sigmoid(-logits), -1)  # log S_0 … log S_{b-1}
    before = jnp.pad(survived, [(0, 0)] * (survived.ndim - 1) + [(1, 0)])[..., :-1]

    def at(values: Array) -> Array:
        return jnp.take_along_axis(values, bins[..., None], -1)[..., 0]

    uncensored = -at(before) - at(jax.nn.log_sigmoid(logits))
    return jnp.where(event > 0, uncensored, -(1 - alpha) * at(survived))


def survival(logits: Array) -> Array:
    """(..., b) probability of having no event up to the end of each bin."""
    return jnp.exp(jnp.cumsum(jax.nn.log_sigmoid(-logits.astype(jnp.float32)), -1))


def discrete_risk(logits: Array) -> Array:
    """(..., b) to (...): minus the sum of survival over the bins, the expected number of bins lived."""
    return -survival(logits).sum(-1)


def cox(risk: Array, time: Array, event: Array, weight: Array) -> Array:
    """Negative log partial likelihood of Cox 1972, ties as in Breslow 1974, per event.

        - sum_i w_i e_i (r_i - log sum_{j: t_j >= t_i} w_j exp r_j) / sum_i w_i e_i

    The risk set is this batch, so the batch should hold the training part, or a good share of it.

    Args:
        risk: (n,) log hazard ratio; time: (n,) any unit; event: (n,) 1 if it happened.
        weight: (n,) >= 0, zero where padded: such a row is in no sum, whatever its values.

    Returns:
        (); zero where no row has an event.
    """
    weight = weight.astype(jnp.float32)
    risk = jnp.where(weight > 0, risk.astype(jnp.float32), 0.0)
    time = jnp.where(weight > 0, time, 0.0)
    counted = jnp.where(weight > 0, event, 0) * weight
    # Every pair is looked at: quicker to compile than a cumulative sum in the order of times, and exact.
    # A padded row has a risk set of its own, so that its logarithm, which weighs nothing, is finite.
    alone = jnp.diag(weight == 0)
    at_risk = jax.nn.logsumexp(risk[None], 1, b=(time >= time[:, None]) * weight + alone)
    each = counted * (risk - at_risk)
    return -each.sum() / jnp.maximum(counted.sum(), 1e-12)
