"""What a head is trained to say of a slide: the loss of its logits, and what is predicted from them.

A task's target is a row of numbers a bag: (1,) a class; (o,) of 0, 1 and NaN for labels that may hold together;
(1,) a number, standardised; (2,) bin or time in months, and event for survival. Unknown parts are NaN and weigh
nothing. What depends on the training part (bins, mean and deviation) differs between members: it is in the target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pathme_jax.errors import UserError
from pathme_jax.losses import survival

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to predict.

    Attributes:
        name: column, or endpoint. kind: classes, labels (that may hold together), number, nll (discrete survival) or cox.
        names: of the classes or labels, else empty.
        bins: of time, of nll.
    """

    name: str
    kind: str
    names: tuple[str, ...] = ()
    bins: int = 0

    @property
    def outputs(self) -> int:
        """Logits."""
        if self.kind in ("classes", "labels"):
            return len(self.names)
        return self.bins if self.kind == "nll" else 1

    @property
    def width(self) -> int:
        """Numbers in a target."""
        if self.kind == "labels":
            return len(self.names)
        return 2 if self.kind in ("nll", "cox") else 1

    def loss(self, logits: Array, target: Array, weight: Array) -> Array:
        """Summed over a batch.

        logits: (b, outputs). target: (b, width). weight: (b,), 0 where padded or not trained on.
        """
        known = ~jnp.isnan(target)
        target = jnp.where(known, target, 0)
        weight = jnp.where(known.any(-1), weight, 0)
        if self.kind == "classes":
            each = optax.softmax_cross_entropy_with_integer_labels(
                logits, target[:, 0].astype(jnp.int32)
            )
        elif self.kind == "labels":
            each = optax.sigmoid_binary_cross_entropy(logits, target)
            each = jnp.where(known, each, 0).sum(-1) / jnp.maximum(known.sum(-1), 1)
        elif self.kind == "number":
            each = (logits[:, 0] - target[:, 0]) ** 2
        elif self.kind == "nll":
            each = survival.discrete_nll(logits, target[:, 0].astype(jnp.int32), target[:, 1])
        else:  # the batch is the risk set, so its loss is one number
            total = survival.cox(logits[:, 0], target[:, 0], target[:, 1], weight)
            return total * (weight * target[:, 1]).sum()
        return (each * weight).sum()

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """(n, outputs) to probabilities (n, c), a standardised number (n, 1), or a risk (n, 1), larger is sooner."""
        if self.kind == "classes":
            return np.asarray(jax.nn.softmax(logits, -1))
        if self.kind == "labels":
            return np.asarray(jax.nn.sigmoid(logits))
        if self.kind == "nll":
            return np.asarray(survival.discrete_risk(jnp.asarray(logits)))[:, None]
        return np.asarray(logits)


@dataclasses.dataclass(frozen=True)
class Tasks:
    """One or several tasks learned by one head, whose logits and targets stand side by side."""

    each: tuple[Task, ...]

    @property
    def form(self) -> Tasks:
        """The same without names: what a compiled program depends on."""
        nameless = (Task("", task.kind, ("",) * len(task.names), task.bins) for task in self.each)
        return Tasks(tuple(nameless))

    @property
    def outputs(self) -> int:
        return sum(task.outputs for task in self.each)

    @property
    def width(self) -> int:
        return sum(task.width for task in self.each)

    def logits_of(self, logits: Array | np.ndarray) -> list:
        """(..., outputs) cut into each task's."""
        return _cut(logits, [task.outputs for task in self.each])

    def targets_of(self, targets: Array | np.ndarray) -> list:
        """(..., width) cut into each task's."""
        return _cut(targets, [task.width for task in self.each])

    def loss(self, logits: Array, targets: Array, weight: Array) -> Array:
        """Sum over the tasks of `Task.loss`; weight (b, tasks)."""
        parts = zip(self.each, self.logits_of(logits), self.targets_of(targets), strict=True)
        each = (task.loss(x, y, weight[:, i]) for i, (task, x, y) in enumerate(parts))
        return sum(each, jnp.zeros(()))

    def label(self, targets: Array) -> Array:
        """(b, width) to (b,) logit of the class of the first task that has classes: what a head's own loss asks for.

        Raises:
            UserError: none has.
        """
        if self.classes is not None:
            before = sum(task.outputs for task in self.each[: self.classes])
            own = self.targets_of(targets)[self.classes][:, 0]
            return before + jnp.nan_to_num(own).astype(jnp.int32)
        raise UserError(
            f"no task with classes among {', '.join(t.name for t in self.each)}", "Use another head"
        )

    @property
    def classes(self) -> int | None:
        """The first task that has classes."""
        return next((i for i, task in enumerate(self.each) if task.kind == "classes"), None)


def _cut(values: Array | np.ndarray, sizes: Sequence[int]) -> list:
    ends = np.cumsum(sizes)
    return [values[..., end - size : end] for size, end in zip(sizes, ends, strict=True)]
