"""Members that hold a large bag out are not computed on it, and end where they would have ended."""

from __future__ import annotations

import numpy as np

from pathme_jax.mil import population
from pathme_jax.mil.buckets import pack
from pathme_jax.mil.folds import TEST, TRAIN
from pathme_jax.mil.heads import make
from pathme_jax.mil.population import Members, Schedule, fit
from pathme_jax.mil.tasks import Task, Tasks


def test_members_that_hold_a_bag_out_are_left_out_of_its_step(monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.arange(8) % 2
    bags = [
        rng.normal(size=(n, 5)).astype(np.float32) for n in [300, 290, 310, 300, 20, 25, 30, 20]
    ]
    parts = np.where(np.arange(8) % 4 == np.arange(8)[:, None] // 2, TEST, TRAIN)
    members = Members(
        parts,
        np.tile(labels.astype(np.float32), (8, 1))[..., None],
        (parts == TRAIN).astype(np.float32)[..., None],
        np.arange(8) % 2,
        np.full(8, 1e-3),
        np.full(8, 1e-2),
    )
    packed = pack(bags)
    assert [population._active(members, b, 1, 1) for b in packed] == [
        6 if b.size > 256 else 8 for b in packed
    ]
    head, tasks = (
        make("abmil", 2, dict(hidden=16, attention=8)),
        Tasks((Task("y", "classes", ("0", "1")),)),
    )

    def losses() -> np.ndarray:
        return fit(head, tasks, packed, members, Schedule(3), progress=False).losses

    monkeypatch.setattr(population, "CPU_BYTES", 0)  # one by one
    some = losses()
    monkeypatch.undo()
    monkeypatch.setattr(population, "LARGE", 10**9)
    everyone = losses()
    assert np.isnan(some).tolist() == np.isnan(everyone).tolist()
    np.testing.assert_allclose(some, everyone, atol=1e-4)
