"""Guards of the plan: folds and controls that can be learned from, each patient counted once."""

from __future__ import annotations

import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.mil.bags import MilBag
from pathme_jax.mil.folds import TEST, TRAIN
from pathme_jax.mil.outcomes import Classes, Number, TimeToEvent
from pathme_jax.mil.plan import make_plan, once, permuted
from pathme_jax.mil.settings import Settings
from pathme_jax.mil.table import Table
from pathme_jax.mil.tasks import Task

Y = Classes(Task("y", "classes", ("a", "b")))


def test_each_control_is_dealt_and_stratified_anew():
    n = 60
    ids = [f"c{i:02}" for i in range(n)]
    truth = (np.arange(n) % 4 == 0)[:, None].astype(float)
    table = Table(ids, ids, [Y], [truth], {}, [], [])
    plan = make_plan(
        [MilBag(c, i, []) for i, c in enumerate(ids)], table, Settings(folds=3, shuffles=2)
    )
    assert len(plan.parts) == 9
    first, second = plan.truth[0][3], plan.truth[0][6]
    assert (first != second).any() and (first != truth).any()
    for part, of in zip(plan.parts, plan.truth[0], strict=True):
        assert of[part == TEST].sum() == 5


def test_nobody_is_refused_for_want_of_the_censored():
    truth = np.stack([np.arange(1, 31.0), np.ones(30)], 1)
    ids = [f"c{i:02}" for i in range(30)]
    outcome = TimeToEvent(Task("os", "nll", bins=4))
    table = Table(ids, ids, [outcome], [truth], {}, [], [])
    bags = [MilBag(case, i, []) for i, case in enumerate(ids)]
    plan = make_plan(bags, table, Settings(folds=5, shuffles=0))
    assert len(plan.parts) == 5 and ((plan.parts == TEST).sum(1) == 6).all()


def test_a_fold_that_knows_nothing_of_a_task_is_named():
    ids = list("abcdef")
    other = np.array([[1.0], [np.nan], [np.nan], [np.nan], [np.nan], [np.nan]])
    table = Table(
        ids, ids, [Y, Number(Task("hrd", "number"))],
        [(np.arange(6) % 2)[:, None].astype(float), other],
        {"fold_0": ["test"] + ["train"] * 5}, [], [],
    )  # fmt: skip
    bags = [MilBag(case, i, []) for i, case in enumerate(ids)]
    with pytest.raises(UserError, match="fold_0 has no slide to learn hrd from"):
        make_plan(bags, table, Settings())


def survival_table(event, folds, cases=None, kind="nll"):
    n = len(event)
    truth = np.stack([np.arange(1.0, n + 1), event], 1)
    ids = [f"s{i:02}" for i in range(n)]
    outcome = TimeToEvent(Task("os", kind, bins=2))
    table = Table(ids, cases or ids, [outcome], [truth], folds, [], [])
    return table, [MilBag(case, i, []) for i, case in enumerate(table.case_ids)]


def test_a_fold_whose_patients_all_had_the_event_is_used_and_one_without_events_left_out():
    event = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    first = ["train"] * 4 + ["test"] * 4
    table, bags = survival_table(event, {"fold_0": first[::-1], "fold_1": first})
    plan = make_plan(bags, table, Settings(shuffles=0))
    assert plan.names == ["fold_1"] and plan.skipped == ["fold_0: no event to train on"]


def test_a_control_is_dealt_again_until_every_fold_can_learn_from_it():
    """Two bins of time want two events; of three in sixteen a fold of the user's may be dealt fewer."""
    event = np.zeros(16)
    event[[1, 3, 5]] = 1
    columns = {f"fold_{f}": ["test" if i % 4 == 2 * f else "train" for i in range(16)] for f in (0, 1)}  # fmt: skip
    table, bags = survival_table(event, columns)
    plan = make_plan(bags, table, Settings(shuffles=30))
    learned = [
        truth[part == TRAIN, 1].sum() for part, truth in zip(plan.parts, plan.truth[0], strict=True)
    ]
    assert min(learned) == 2
    first = [permuted(table.case_ids, table.truth, [0, 7, i])[0] for i in range(30)]
    assert min(of[part == TRAIN, 1].sum() for of in first for part in plan.parts[:2]) < 2


def test_a_control_that_cannot_be_dealt_is_refused():
    event = np.array([1.0, 1] + [0] * 60)
    columns = {f"fold_{f}": ["train"] * 2 + ["test"] * 60 for f in range(2)}
    table, bags = survival_table(event, columns)
    with pytest.raises(UserError, match=r"in 50 dealings .* nothing to learn from"):
        make_plan(bags, table, Settings())


def test_patients_are_counted_once_however_many_slides_they_have():
    """In the quantiles of time and in a number's mean; also where only one of the slides knows it."""
    cases = ["a"] * 5 + ["b", "c", "d", "e"]
    part = np.array([TRAIN] * 8 + [TEST])
    truth = np.array([np.nan, 1, 1, 1, 1, 2, 3, 4, 9.0])[:, None]
    kept = once(part, truth, cases)
    assert (kept == TRAIN).tolist() == [False, True, False, False, False, True, True, True, False]
    assert kept[8] == TEST
    assert Number(Task("n", "number")).scale(kept, truth)[1] == 2.5
    table, bags = survival_table(np.ones(12), {}, ["a"] * 8 + list("bcde"))
    table.truth[0][:8, 0] = 1
    settings = Settings(folds=2, shuffles=0)
    plan = make_plan(bags, table, settings)
    asked = once(plan.parts[0], plan.truth[0][0], table.case_ids)
    assert (asked == TRAIN).sum() == len({c for c, p in zip(table.case_ids, plan.parts[0], strict=True) if p == TRAIN})  # fmt: skip


def test_too_few_events_for_the_bins_are_the_folds_fault_and_not_the_controls():
    event = np.zeros(40)
    event[:3] = 1
    table, bags = survival_table(event, {})
    wide = TimeToEvent(Task("os", "nll", bins=4))
    table.outcomes[0] = wide
    with pytest.raises(UserError, match=r"events .* do not fill 4 time bins"):
        make_plan(bags, table, Settings())


@pytest.mark.parametrize("seed", range(6))
def test_controls_have_the_folds_of_the_truth_however_unequal_the_slides(seed):
    """Counted by slides, the quarters of a number would depend on who has fifteen of them."""
    rng = np.random.default_rng(seed)
    slides = np.concatenate([rng.integers(1, 4, 43), [15]])
    cases = [f"c{i:02}" for i in np.repeat(np.arange(44), slides)]
    truth = np.repeat(rng.normal(size=44), slides)[:, None]
    ids = [f"s{i:03}" for i in range(len(cases))]
    table = Table(ids, cases, [Number(Task("n", "number"))], [truth], {}, [], [])
    bags = [MilBag(case, i, []) for i, case in enumerate(cases)]
    plan = make_plan(bags, table, Settings(folds=4, shuffles=3))
    assert len(plan.parts) == 4 * 4
    for row, (part, of) in enumerate(zip(plan.parts, plan.truth[0], strict=True)):
        tested = {c: v for c, v, p in zip(cases, of[:, 0], part, strict=True) if p == TEST}
        quarter = np.searchsorted(
            np.quantile(truth_of(cases, of), [0.25, 0.5, 0.75]), list(tested.values())
        )
        assert len(tested) == 11 and np.ptp(np.bincount(quarter, minlength=4)) <= 1, row


def truth_of(cases, values):
    return list(dict(zip(cases, values[:, 0].tolist(), strict=True)).values())
