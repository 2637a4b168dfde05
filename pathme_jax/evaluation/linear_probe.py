"""Linear classifiers on frozen features, fitted as the published protocols fit them; a Cox model beside them.

All take features as they are: none of these protocols standardises.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from pathme_jax.losses.survival import cox


@dataclasses.dataclass(frozen=True)
class LBFGS:
    """Logistic regression by L-BFGS.

    Attributes:
        cost: C, the inverse strength of the penalty; None: features x classes / 100 (UNI, after SLIP).
        balanced: weigh every class alike.
        max_iter: iterations.
        penalty: "squared", C sum of losses + |W|^2 / 2 (scikit-learn); "norm", mean of losses + |W| / (2 C), what
            UNI's released code minimises: it does not square the norm.
    """

    cost: float | None = None
    balanced: bool = False
    max_iter: int = 1000
    penalty: str = "squared"


@dataclasses.dataclass(frozen=True)
class AdamW:
    """A linear layer by stochastic gradients, of several seeds at once, the best epoch on the validation part kept.

    Attributes:
        rate, final_rate: of learning, first and last; a cosine in between, or constant where equal.
        decay: of the weights. batch: rows a step.
        epochs, steps: how long; one of them.
        patience: epochs without a better criterion before a run stops; None: never.
        criterion: "auroc" (macro) or "balanced_accuracy" of the validation part; without one the last epoch counts.
        initial: standard deviation of the first weights; None: uniform, +-1/sqrt(d), PyTorch's default.
        runs: seeds, of weights and order; each is measured, and the mean reported.
    """

    rate: float
    final_rate: float
    decay: float
    batch: int = 256
    epochs: int | None = None
    steps: int | None = None
    patience: int | None = None
    criterion: str = "auroc"
    initial: float | None = None
    runs: int = 1


def fit_predict(
    settings: LBFGS | AdamW,
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    test_x: np.ndarray,
    classes: int,
    seed: int = 0,
) -> np.ndarray:
    """(r, m, c) probabilities of r runs: one, or `AdamW.runs`.

    Args:
        train, valid: (n, d) features and (n,) int labels; valid may be empty, and L-BFGS does not look at it.
        test_x: (m, d).
        classes: c; one absent from the training part has probability 0 (L-BFGS), or none to speak of (AdamW).
    """
    if isinstance(settings, AdamW):
        return _adamw(settings, train, valid, test_x, classes, seed)
    x, (present, y) = train[0].astype(np.float64), np.unique(train[1], return_inverse=True)
    cost = settings.cost or x.shape[1] * len(present) / 100
    scores = np.zeros((1, len(test_x), classes))
    if settings.penalty == "norm":
        found = _norm_penalised(x, y, cost, settings.max_iter, test_x)
    else:
        weight = "balanced" if settings.balanced else None
        model = LogisticRegression(C=cost, max_iter=settings.max_iter, class_weight=weight)
        found = model.fit(x, y).predict_proba(test_x.astype(np.float64))
    scores[0][:, present] = found
    return scores


def _norm_penalised(
    x: np.ndarray, y: np.ndarray, cost: float, max_iter: int, test_x: np.ndarray
) -> np.ndarray:
    """(m, c) probabilities at the minimum of mean cross-entropy + |W| / (2 cost), the bias free."""
    (n, d), c = x.shape, int(y.max()) + 1
    one_hot = np.eye(c)[y]

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = theta[: d * c].reshape(d, c), theta[d * c :]
        logits = x @ weight + bias
        size = np.linalg.norm(weight)
        residual = (softmax(logits, 1) - one_hot) / n
        slope = x.T @ residual + weight / (2 * cost * max(size, 1e-12))
        loss = -(one_hot * log_softmax(logits, 1)).sum() / n + size / (2 * cost)
        return float(loss), np.append(slope.ravel(), residual.sum(0))

    options = {"maxiter": max_iter, "maxfun": 10 * max_iter}
    theta = minimize(objective, np.zeros(d * c + c), jac=True, method="L-BFGS-B", options=options).x
    return softmax(test_x @ theta[: d * c].reshape(d, c) + theta[d * c :], 1)


def _adamw(settings, train, valid, test_x, classes, seed) -> np.ndarray:
    per_epoch = math.ceil(len(train[1]) / settings.batch)
    epochs = settings.epochs or math.ceil((settings.steps or per_epoch) / per_epoch)
    keys = jax.random.split(jax.random.key(seed), settings.runs)
    scores = _adamw_runs(
        *(settings, epochs, classes, len(valid[1]) > 0, keys),
        *(jnp.asarray(part, jnp.float32) for part in (train[0], valid[0], test_x)),
        *(jnp.asarray(part[1], jnp.int32) for part in (train, valid)),
    )
    return np.asarray(scores)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _adamw_runs(settings, epochs, classes, validated, keys, x, valid_x, test_x, y, valid_y):
    n, d = x.shape
    size = min(settings.batch, n)
    steps = math.ceil(n / size)
    schedule = optax.cosine_decay_schedule(
        settings.rate, epochs * steps, settings.final_rate / settings.rate
    )
    optimiser = optax.adamw(schedule, weight_decay=settings.decay)

    def loss_of(params, rows, counted):
        logits = x[rows] @ params["weight"] + params["bias"]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
        return (each * counted).sum() / counted.sum()

    def step(state, batch):
        params, moments = state
        update, moments = optimiser.update(jax.grad(loss_of)(params, *batch), moments, params)
        return (jax.tree.map(jnp.add, params, update), moments), None

    def epoch(carry):
        number, state, best, score, stale, key = carry
        order = jnp.resize(
            jax.random.permutation(jax.random.fold_in(key, number), n), (steps, size)
        )
        counted = (jnp.arange(steps * size) < n).astype(jnp.float32).reshape(steps, size)
        state, _ = jax.lax.scan(step, state, (order, counted))
        if not validated:
            return number + 1, state, state[0], score, stale, key
        logits = valid_x @ state[0]["weight"] + state[0]["bias"]
        now = _criterion(settings.criterion, logits, valid_y)
        better = now > score
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state[0], best)
        stale = jnp.where(better, 0, stale + 1)
        return number + 1, state, best, jnp.maximum(now, score), stale, key

    def unfinished(carry):
        number, _, _, _, stale, _ = carry
        return (number < epochs) & (stale < (settings.patience or epochs + 1))

    def run(key):
        first, order = jax.random.split(key)
        if settings.initial is None:
            bound = 1 / math.sqrt(d)
            a, b = jax.random.split(first)
            weight = jax.random.uniform(a, (d, classes), minval=-bound, maxval=bound)
            bias = jax.random.uniform(b, (classes,), minval=-bound, maxval=bound)
        else:
            weight = settings.initial * jax.random.normal(first, (d, classes))
            bias = jnp.zeros(classes)
        params = {"weight": weight, "bias": bias}
        carry = (0, (params, optimiser.init(params)), params, jnp.float32(-1), 0, order)
        best = jax.lax.while_loop(unfinished, epoch, carry)[2]
        return jax.nn.softmax(test_x @ best["weight"] + best["bias"])

    return jax.vmap(run)(keys)


def _criterion(name: str, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the classes present: of recall, or of the AUROC of one against the rest (by midranks)."""
    is_class = labels[:, None] == jnp.arange(logits.shape[1])
    count = is_class.sum(0)
    if name == "balanced_accuracy":
        hits = (logits.argmax(1)[:, None] == jnp.arange(logits.shape[1])) & is_class
        known, value = count > 0, hits.sum(0) / jnp.maximum(count, 1)
    else:
        scores = jax.nn.softmax(logits).T
        ordered = jnp.sort(scores, 1)
        low, high = (
            jax.vmap(lambda a, s, side=side: jnp.searchsorted(a, s, side=side))(ordered, scores)
            for side in ("left", "right")
        )
        ranks = ((low + high + 1) / 2 * is_class.T).sum(1)
        pairs = count * (len(labels) - count)
        known = pairs > 0
        value = (ranks - count * (count + 1) / 2) / jnp.maximum(pairs, 1)
    return jnp.where(known, value, 0).sum() / jnp.maximum(known.sum(), 1)


def cox_ridge(x: np.ndarray, time: np.ndarray, event: np.ndarray, penalty: float) -> np.ndarray:
    """(d,) coefficients of Cox regression, Breslow's ties: least sum of -log partial likelihood + penalty |b|^2 / 2.

    Args:
        x: (n, d), of like scale; time, event: (n,).
    """
    events = max(int(np.sum(event)), 1)
    parts = [jnp.asarray(part, jnp.float32) for part in (x, time, event)]

    @jax.jit
    @jax.value_and_grad
    def objective(b):
        loss = cox(parts[0] @ b, parts[1], parts[2], jnp.ones(len(time)))
        return loss + penalty * (b * b).sum() / (2 * events)

    def as_scipy(b: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = objective(jnp.asarray(b, jnp.float32))
        return float(value), np.asarray(slope, np.float64)

    return minimize(as_scipy, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x
