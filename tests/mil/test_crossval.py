"""Guards of a cross-validation: each part sees its own members, its own training part, its own control."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.evaluation.auroc import auroc, permutation_p
from pathme_jax.evaluation.survival import concordance
from pathme_jax.files import write_json
from pathme_jax.mil import crossval, feed, population
from pathme_jax.mil.bags import MilBag
from pathme_jax.mil.buckets import pack
from pathme_jax.mil.comparison import compare
from pathme_jax.mil.folds import TEST, TRAIN, VALIDATION
from pathme_jax.mil.heads import make
from pathme_jax.mil.outcomes import Classes, Labels, Number, TimeToEvent
from pathme_jax.mil.population import Population
from pathme_jax.mil.settings import Settings
from pathme_jax.mil.table import Table, read
from pathme_jax.mil.tasks import Task, Tasks
from pathme_jax.records.features import Bag

Y = Classes(Task("y", "classes", ("a", "b")))


def test_a_fold_is_answered_by_its_own_members(monkeypatch):
    asked = []

    def predict(fitted, packed, pairs):
        asked.append(pairs[:, 0].tolist())
        return np.zeros((len(pairs), 2)), [np.ones((1, 1))] * len(pairs)

    monkeypatch.setattr(crossval.population, "predict", predict)
    fitted = Population(None, Tasks((Y.task,)), {}, *[np.zeros(0)] * 3)
    crossval.answers(fitted, [], np.array([[0, 0], [2, 1]]), 3)
    assert asked == [[0, 6], [1, 7], [2, 8]]


def test_each_control_is_dealt_and_stratified_anew():
    n = 60
    ids = [f"c{i:02}" for i in range(n)]
    truth = (np.arange(n) % 4 == 0)[:, None].astype(float)
    table = Table(ids, ids, [Y], [truth], {}, [], [])
    plan = crossval.make_plan(
        [MilBag(c, i, []) for i, c in enumerate(ids)], table, Settings(folds=3, shuffles=2)
    )
    assert len(plan.parts) == 9
    first, second = plan.truth[0][3], plan.truth[0][6]
    assert (first != second).any() and (first != truth).any()
    for part, of in zip(plan.parts, plan.truth[0], strict=True):
        assert of[part == TEST].sum() == 5


@pytest.mark.parametrize(
    "outcome, truth",
    [
        (Number(Task("n", "number")), np.arange(40.0)[:, None]),
        (TimeToEvent(Task("os", "nll", bins=4)), np.stack([np.arange(1, 41.0), np.ones(40)], 1)),
    ],
)
def test_targets_know_the_training_part_alone(outcome, truth):
    part = np.where(np.arange(40) < 20, TRAIN, np.where(np.arange(40) < 30, VALIDATION, TEST))
    other = truth.copy()
    other[20:, 0] /= 100
    np.testing.assert_array_equal(
        outcome.targets(part, truth)[:20], outcome.targets(part, other)[:20]
    )
    assert outcome.scale(part, truth) == outcome.scale(part, other)


def test_the_linear_baseline_does_not_see_what_it_is_tested_on():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), (np.arange(30) % 2)[:, None].astype(float)
    part = np.where(np.arange(30) < 20, TRAIN, TEST)
    plan = crossval.Plan(part[None], [y[None]], (part == TRAIN)[None, :, None] * 1.0, ["0"], [])
    far = x.copy()
    far[21:] += 100
    one, other = (crossval._linear(Y, v, plan, 0, np.array([[0, 20]])) for v in (x, far))
    np.testing.assert_array_equal(one, other)


def test_labels_are_stratified_by_the_rarest_and_numbers_by_size():
    truth = np.array([[1, 0], [1, 0], [1, 1], [0, 0]], float)
    assert Labels(Task("l", "labels", ("x", "z"))).strata(truth)[0].tolist() == [0, 0, 1, 0]
    order = np.random.default_rng(0).permutation(40)
    quarters, names = Number(Task("n", "number")).strata(order[:, None].astype(float))
    assert quarters.tolist() == (order // 10).tolist() and len(names) == 4
    tied = np.where(np.arange(60) < 48, 0.0, np.arange(60))[:, None]  # four fifths are zero
    assert len(np.unique(Number(Task("n", "number")).strata(tied)[0])) > 1


def csv(path, head, rows):
    path.write_text("\n".join([head] + [",".join(map(str, r)) for r in rows]) + "\n")
    return path


def test_splits_replace_fold_columns_and_tasks_share_folds(tmp_path):
    rows = [
        (
            f"c{i}",
            f"s{i}",
            "ab"[i % 2] if i < 4 else "",
            "uv"[i % 2] if i > 1 else "",
            "train" if i % 3 else "test",
        )
        for i in range(6)
    ]
    path = csv(tmp_path / "l.csv", "case_id,slide_id,y,z,fold_0", rows)
    table = read(path, "y,z")
    assert table.folds == {"fold_0": ["test", "train", "train"] * 2} and table.unlabelled == []
    splits = csv(tmp_path / "splits_0.csv", "train,val,test", [("s0", "", "s5"), ("s1", "", "s4")])
    assert list(read(path, "y,z", splits=splits).folds) == ["splits_0"]


def test_runs_are_compared_within_folds_whatever_the_order_of_rows(tmp_path):
    rows = [
        (f"c{i:02}", i % 2, "ab"[i // 2 % 2], 0, (i // 2 % 2) * 0.1 + (i % 2) * 0.5)
        for i in range(40)
    ]
    for name, order in (("one", rows), ("two", rows[::-1])):
        (tmp_path / name).mkdir()
        csv(tmp_path / name / "cases.csv", "case_id,fold,label,score_a,score_b", order)
        write_json(
            tmp_path / name / "metrics.json",
            {"task": "y", "kind": "classes", "measure": "auroc", "classes": ["a", "b"]},
        )
    found = compare(tmp_path / "one", tmp_path / "two", draws=20)
    assert found["first"] == found["second"] == 1 and found["permutation_p"] == 1


def test_the_validation_loss_weighs_classes_alike():
    weights = population.balance(
        Tasks((Y.task,)), np.array([[0], [0], [0], [1], [np.nan]], np.float32)
    )
    np.testing.assert_allclose(weights[:, 0], [2 / 3, 2 / 3, 2 / 3, 2, 0], rtol=1e-6)


def test_an_epoch_is_shuffled_within_and_between_sizes():
    packed = pack([np.zeros((m, 1), np.float32) for m in [8] * 40 + [90] * 40])
    a, b = (feed.order(packed, 1, [0, 4, e]) for e in (0, 1))
    assert len({tuple(w for w, _ in feed.order(packed, 1, [0, 4, e])) for e in range(9)}) > 1
    assert sorted(r.tobytes() for _, r in a) != sorted(r.tobytes() for _, r in b)


def test_nobody_is_refused_for_want_of_the_censored():
    truth = np.stack([np.arange(1, 31.0), np.ones(30)], 1)
    ids = [f"c{i:02}" for i in range(30)]
    outcome = TimeToEvent(Task("os", "nll", bins=4))
    table = Table(ids, ids, [outcome], [truth], {}, [], [])
    bags = [MilBag(case, i, []) for i, case in enumerate(ids)]
    plan = crossval.make_plan(bags, table, Settings(folds=5, shuffles=0))
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
        crossval.make_plan(bags, table, Settings())


def test_scores_that_are_no_numbers_are_no_order():
    """Sorted, NaN would keep the order of the rows, which is that of the patients' names."""
    labels, folds, cases = np.repeat([0, 1], 5), np.zeros(10, int), np.arange(10)
    scores = np.full((10, 2), np.nan)
    assert np.isnan(auroc(scores, labels, folds))
    assert np.isnan(permutation_p(scores, labels, folds, cases, draws=9))
    assert np.isnan(concordance(scores[:, 1], np.arange(1, 11.0), labels))
    table = Table([], [], [Y], [], {}, [], [])
    with pytest.raises(UserError, match="head of fold_7 says of y what is not a number"):
        plan = crossval.Plan(np.zeros(0), [], np.zeros(0), ["fold_0", "fold_7"], [])
        crossval._finite(
            [np.array([[0.5, 0.5], [np.nan, 0.5]])], np.array([[0, 3], [1, 4]]), plan, table
        )


def test_a_class_is_the_logit_it_has_among_all_tasks():
    tasks = Tasks((Task("os", "nll", bins=4), Y.task))
    targets = jnp.asarray([[0, 1, 1.0], [2, 0, 0.0]])
    assert tasks.label(targets).tolist() == [5, 4]


def test_a_bag_that_hardly_a_member_trains_on():
    """Fewer than a turn of members, and none."""
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(300 if i < 2 else 9, 3)).astype(np.float32) for i in range(8)]
    parts = np.full((6, 8), TRAIN)
    parts[1:, 0], parts[:, 1] = TEST, TEST
    members = population.Members(
        parts, np.tile(np.arange(8.0) % 2, (6, 1))[..., None].astype(np.float32),
        (parts == TRAIN)[..., None].astype(np.float32), np.arange(6), np.full(6, 1e-3), np.zeros(6),
    )  # fmt: skip
    head = make("abmil", 2, dict(hidden=4, attention=4, dropout=0.0))
    found = population.fit(
        head, Tasks((Y.task,)), pack(bags), members, population.Schedule(1), progress=False
    )
    assert (~np.isnan(found.losses)).sum(0).tolist() == [7, 6, 6, 6, 6, 6]


def test_a_risk_set_is_not_a_bag_or_two(monkeypatch):
    """Sizes are few for cox, where bags of one size are compared with each other alone."""
    asked = {}

    def packed(features, cells=None, **more):
        asked.update(more)
        raise InterruptedError

    monkeypatch.setattr(crossval.buckets, "pack", packed)
    ids = [f"c{i:02}" for i in range(40)]
    truth = np.stack([np.arange(1, 41.0), np.arange(40) % 2], 1)
    table = Table(ids, ids, [TimeToEvent(Task("os", "cox"))], [truth], {}, [], [])
    bags = [MilBag(c, i, [slide(i)]) for i, c in enumerate(ids)]
    settings = Settings(batch=8, shuffles=0)
    with pytest.raises(InterruptedError):
        crossval.fit_plan(bags, table, crossval.make_plan(bags, table, settings), settings, "x")
    assert asked["sizes"] == 1


def slide(i):
    grid = np.zeros((4, 2), np.int32)
    return Bag(f"s{i}", np.zeros((4, 3), np.float32), grid, grid, np.zeros(4, np.uint8), {})


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
    plan = crossval.make_plan(bags, table, Settings(shuffles=0))
    assert plan.names == ["fold_1"] and plan.skipped == ["fold_0: no event to train on"]


def test_a_control_is_dealt_again_until_every_fold_can_learn_from_it():
    """Two bins of time want two events; of three in sixteen a fold of the user's may be dealt fewer."""
    event = np.zeros(16)
    event[[1, 3, 5]] = 1
    columns = {f"fold_{f}": ["test" if i % 4 == 2 * f else "train" for i in range(16)] for f in (0, 1)}  # fmt: skip
    table, bags = survival_table(event, columns)
    plan = crossval.make_plan(bags, table, Settings(shuffles=30))
    learned = [
        truth[part == TRAIN, 1].sum() for part, truth in zip(plan.parts, plan.truth[0], strict=True)
    ]
    assert min(learned) == 2
    first = [crossval.permuted(table.case_ids, table.truth, [0, 7, i])[0] for i in range(30)]
    assert min(of[part == TRAIN, 1].sum() for of in first for part in plan.parts[:2]) < 2


def test_a_control_that_cannot_be_dealt_is_refused():
    event = np.array([1.0, 1] + [0] * 60)
    columns = {f"fold_{f}": ["train"] * 2 + ["test"] * 60 for f in range(2)}
    table, bags = survival_table(event, columns)
    with pytest.raises(UserError, match=r"in 50 dealings .* nothing to learn from"):
        crossval.make_plan(bags, table, Settings())


def test_patients_are_counted_once_however_many_slides_they_have():
    """In the quantiles of time and in a number's mean; also where only one of the slides knows it."""
    cases = ["a"] * 5 + ["b", "c", "d", "e"]
    part = np.array([TRAIN] * 8 + [TEST])
    truth = np.array([np.nan, 1, 1, 1, 1, 2, 3, 4, 9.0])[:, None]
    kept = crossval.once(part, truth, cases)
    assert (kept == TRAIN).tolist() == [False, True, False, False, False, True, True, True, False]
    assert kept[8] == TEST
    assert Number(Task("n", "number")).scale(kept, truth)[1] == 2.5
    table, bags = survival_table(np.ones(12), {}, ["a"] * 8 + list("bcde"))
    table.truth[0][:8, 0] = 1
    settings = Settings(folds=2, shuffles=0)
    plan = crossval.make_plan(bags, table, settings)
    asked = crossval.once(plan.parts[0], plan.truth[0][0], table.case_ids)
    assert (asked == TRAIN).sum() == len({c for c, p in zip(table.case_ids, plan.parts[0], strict=True) if p == TRAIN})  # fmt: skip


def test_too_few_events_for_the_bins_are_the_folds_fault_and_not_the_controls():
    event = np.zeros(40)
    event[:3] = 1
    table, bags = survival_table(event, {})
    wide = TimeToEvent(Task("os", "nll", bins=4))
    table.outcomes[0] = wide
    with pytest.raises(UserError, match=r"events .* do not fill 4 time bins"):
        crossval.make_plan(bags, table, Settings())


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
    plan = crossval.make_plan(bags, table, Settings(folds=4, shuffles=3))
    assert len(plan.parts) == 4 * 4
    for row, (part, of) in enumerate(zip(plan.parts, plan.truth[0], strict=True)):
        tested = {c: v for c, v, p in zip(cases, of[:, 0], part, strict=True) if p == TEST}
        quarter = np.searchsorted(
            np.quantile(truth_of(cases, of), [0.25, 0.5, 0.75]), list(tested.values())
        )
        assert len(tested) == 11 and np.ptp(np.bincount(quarter, minlength=4)) <= 1, row


def truth_of(cases, values):
    return list(dict(zip(cases, values[:, 0].tolist(), strict=True)).values())


def test_cases_are_counted_by_what_any_of_their_slides_knows():
    bags = [MilBag(case, i, []) for i, case in enumerate(["p", "p", "q", "r"])]
    known = crossval._known(bags, np.array([[np.nan], [3.0], [4.0], [np.nan]]))
    assert known.tolist() == [[3.0], [4.0]]
