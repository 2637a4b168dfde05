"""ILRA-MIL: the contract, and a task the mean cannot solve."""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

from pathme_jax.mil.heads.ilra import ILRA

contract: Any = types.SimpleNamespace(
    **runpy.run_path(str(Path(__file__).with_name("contract.py")))
)
planted: Any = types.SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted.py"))))

SMALL: dict[str, Any] = dict(outputs=3, hidden=8, heads=2, rank=3, depth=1)
TestILRA = contract.checks(lambda: ILRA(**SMALL))


def test_learns_which_kinds_meet_which_the_mean_cannot():
    train, test = (planted.conjunction(64, side=6, seed=seed) for seed in (0, 1))
    assert planted.of_mean(train, test) < 0.6
    assert (
        planted.of_head(
            ILRA(1, hidden=16, heads=2, rank=4, depth=1), train, test, steps=25, rate=1e-2
        )
        > 0.9
    )
