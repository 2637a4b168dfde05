"""Guards of a cross-validation: each fold is answered by its own members and sees its own training part."""

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
from pathme_jax.mil.plan import Plan, make_plan
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
    plan = Plan(part[None], [y[None]], (part == TRAIN)[None, :, None] * 1.0, ["0"], [])
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


def test_scores_that_are_no_numbers_are_no_order():
    """Sorted, NaN would keep the order of the rows, which is that of the patients' names."""
    labels, folds, cases = np.repeat([0, 1], 5), np.zeros(10, int), np.arange(10)
    scores = np.full((10, 2), np.nan)
    assert np.isnan(auroc(scores, labels, folds))
    assert np.isnan(permutation_p(scores, labels, folds, cases, draws=9))
    assert np.isnan(concordance(scores[:, 1], np.arange(1, 11.0), labels))
    table = Table([], [], [Y], [], {}, [], [])
    with pytest.raises(UserError, match="head of fold_7 says of y what is not a number"):
        plan = Plan(np.zeros(0), [], np.zeros(0), ["fold_0", "fold_7"], [])
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
        crossval.fit_plan(bags, table, make_plan(bags, table, settings), settings, "x")
    assert asked["sizes"] == 1


def slide(i):
    grid = np.zeros((4, 2), np.int32)
    return Bag(f"s{i}", np.zeros((4, 3), np.float32), grid, grid, np.zeros(4, np.uint8), {})


def test_cases_are_counted_by_what_any_of_their_slides_knows():
    bags = [MilBag(case, i, []) for i, case in enumerate(["p", "p", "q", "r"])]
    known = crossval._known(bags, np.array([[np.nan], [3.0], [4.0], [np.nan]]))
    assert known.tolist() == [[3.0], [4.0]]
