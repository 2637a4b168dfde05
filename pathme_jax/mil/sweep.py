"""Rates and decays to choose among: every fold by the loss on its own validation part, never by what it is tested on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.mil.folds import VALIDATION
from pathme_jax.mil.population import Population
from pathme_jax.mil.settings import Settings

SWEPT = ("learning_rate", "weight_decay")
Candidate = dict[str, float]


def candidates(settings: Settings) -> list[Candidate]:
    """Every combination of `settings.sweep`, such as "learning_rate=1e-4:1e-3,weight_decay=0:1e-2"; what it leaves
    out is as in `settings`, and without it there is one candidate.

    Raises:
        UserError: another setting, a setting twice, or a value that is no number above zero (a decay may be zero).
    """
    values = {name: [getattr(settings, name)] for name in SWEPT}
    given = [part.partition("=") for part in settings.sweep.split(",") if part]
    for name, _, text in given:
        if name not in SWEPT or [each[0] for each in given].count(name) > 1:
            raise UserError(
                f"--sweep {settings.sweep!r}: {name!r}", f"Expected each of {', '.join(SWEPT)} once"
            )
        values[name] = [_number(settings.sweep, name, each) for each in text.split(":")]
    return [dict(zip(SWEPT, each, strict=True)) for each in itertools.product(*values.values())]


def _number(sweep: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not (0 < value < np.inf or (value == 0 and name == "weight_decay")):
        raise UserError(
            f"--sweep {sweep!r}: {name} {text!r}", "Expected numbers joined by colons, as 1e-4:1e-3"
        )
    return value


def check(parts: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Refuses folds, each (n,) parts, without a validation part to choose by.

    Raises:
        UserError: names the first of them.
    """
    for part, name in zip(parts, names, strict=True):
        if not (part == VALIDATION).any():
            raise UserError(
                f"--sweep, but {name} has no validation part to choose by",
                "Give 20 training patients or more of every class, or mark some as val in your folds",
            )


def choose(fitted: Population, rows: int, tried: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """The members of each row's best candidate, and what every candidate came to.

    Args:
        fitted: rows * tried * seeds members in that order.

    Returns:
        (rows * seeds,) members, and (rows, tried) validation losses: of the epoch each seed kept, mean over seeds.
    """
    kept = fitted.history[np.arange(len(fitted.best)), fitted.best, 1]
    losses = kept.reshape(rows, tried, seeds).mean(-1)
    best = np.where(np.isnan(losses), np.inf, losses).argmin(1)
    first = (np.arange(rows) * tried + best) * seeds
    return (first[:, None] + np.arange(seeds)).ravel(), losses
