"""Rates and decays to choose among: every fold by the loss on its own validation part, never by what it is tested on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

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


def check(parts: Mapping[str, np.ndarray], truth: Sequence[np.ndarray]) -> None:
    """Refuses folds, each (n,) parts, without a validation part that knows of a task; truth of each (n, w).

    Raises:
        UserError: names the first of them.
    """
    known = np.any([~np.isnan(of).all(1) for of in truth], 0)
    for name, part in parts.items():
        if not ((part == VALIDATION) & known).any():
            raise UserError(
                f"--sweep, but {name} has no validation part to choose by",
                "Give 20 training patients or more of every class, or mark some as val in your folds",
            )


def choose(fitted: Population, rows: int, tried: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """The best candidate of each row, the first where none has a loss, and what every candidate came to.

    Args:
        fitted: rows * tried * seeds members in that order.

    Returns:
        (rows,) candidates, and (rows, tried) validation losses: of the epoch each seed kept, mean over seeds.
    """
    kept = fitted.history[np.arange(len(fitted.best)), fitted.best, 1]
    losses = kept.reshape(rows, tried, seeds).mean(-1)
    return np.where(np.isnan(losses), np.inf, losses).argmin(1), losses
