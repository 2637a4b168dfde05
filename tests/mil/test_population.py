"""The population trainer: members are independent, weights mean what they say, planted instances are found."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.evaluation.auroc import auroc
from pathme_jax.mil import population
from pathme_jax.mil.baselines import logistic, standardised
from pathme_jax.mil.buckets import pack
from pathme_jax.mil.folds import TEST, TRAIN, VALIDATION, stratified
from pathme_jax.mil.heads import make
from pathme_jax.mil.plan import bag_weights
from pathme_jax.mil.population import Members, Schedule, fit, predict
from pathme_jax.mil.tasks import Task, Tasks

TASKS = Tasks((Task("label", "classes", ("0", "1")),))
HEAD = make("abmil", 2, dict(hidden=64, attention=32, dropout=0.25))


def members_of(parts, labels, cases, seeds=1):
    """Every row of `parts` with each of `seeds` first weights."""
    each = np.repeat(np.arange(len(parts)), seeds)
    weights = np.array([bag_weights(part, labels, cases) for part in parts])[..., None]
    targets = np.tile(labels.astype(np.float32), (len(each), 1))[..., None]
    count = len(each)
    return Members(
        parts[each],
        targets,
        weights[each],
        np.arange(count) % seeds,
        np.full(count, 3e-3),
        np.full(count, 1e-2),
    )


def planted(n=56, m=40, d=8, witnesses=1, seed=0):
    """Bags that differ in one strange instance of forty (2.5 %), under slide-wide shifts as of stain."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    bags = [
        (rng.normal(size=(m - i % 7, d)) + 0.4 * rng.normal(size=d)).astype(np.float32)
        for i in range(n)
    ]
    for bag, label in zip(bags, labels, strict=True):
        bag[:witnesses, 0] += 9 * label
    return bags, labels, [f"c{i}" for i in range(n)]


def fitted(bags, members, schedule, head=HEAD):
    return fit(head, TASKS, pack(bags), members, schedule, progress=False)


@pytest.fixture(scope="module")
def cohort():
    bags, labels, cases = planted()
    parts = stratified(cases, labels, ["0", "1"], 3, 0)
    members = members_of(parts, labels, cases, seeds=2)
    schedule = Schedule(20, batch=4)
    return bags, labels, members, schedule, fitted(bags, members, schedule)


def test_planted_instances_are_found_where_the_mean_hides_them(cohort):
    bags, labels, members, _, population = cohort
    pairs = np.argwhere(members.parts == TEST)
    logits, attention = predict(population, pack(bags), pairs)
    scores = TASKS.each[0].predict(logits)
    own = np.array([bag.mean(0) for bag in bags])
    mean_pool = np.zeros((len(pairs), 2))
    for row in range(len(members)):
        mine = pairs[:, 0] == row
        weights = members.weights[row, :, 0]
        train = weights > 0
        said = logistic(standardised(own, train), train, labels[train], weights[train], 2)
        mean_pool[mine] = said[pairs[mine, 1]]
    truth, folds = labels[pairs[:, 1]], pairs[:, 0]
    assert auroc(scores, truth, folds) > 0.95
    assert auroc(mean_pool, truth, folds) < 0.75
    on_planted = np.array([a[0, 0] for a in attention])  # uniform attention would give 1/40
    assert on_planted[truth == 1].mean() > 0.4 > 0.1 > on_planted[truth == 0].mean()
    np.testing.assert_allclose([a.sum() for a in attention], 1, atol=1e-5)
    assert [a.shape[1] for a in attention] == [len(bags[b]) for b in pairs[:, 1]]


def test_a_member_is_the_same_alone(cohort):
    """Losses of its first 20 steps to 1e-4, where dropout is the same; and it tests alike."""
    bags, _, members, schedule, population = cohort
    single = fitted(bags, members.take([3]), schedule)
    together = population.losses[:, 3]
    seen = np.flatnonzero(~np.isnan(together))[:20]
    assert np.isnan(single.losses[:, 0]).tolist() == np.isnan(together).tolist()
    np.testing.assert_allclose(single.losses[seen, 0], together[seen], atol=1e-4)
    pairs = np.argwhere(members.parts[3:4] == TEST)
    expected, _ = predict(single, pack(bags), pairs)
    found, _ = predict(population, pack(bags), pairs + np.array([3, 0]))
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_members_differ_by_their_seed_and_start_alike_with_the_same(cohort):
    *_, population = cohort
    first = population.params["classify"]["kernel"]
    assert np.abs(first[0] - first[1]).max() > 1e-3
    start = population_state(np.array([0, 1, 0]))
    np.testing.assert_array_equal(start[0], start[2])
    assert np.abs(start[0] - start[1]).max() > 1e-3


def population_state(seeds):
    state = population._init(HEAD, 8, seeds)
    return np.asarray(state["params"]["classify"]["kernel"])


def test_the_same_again_is_the_same_to_the_bit(cohort):
    bags, _, members, schedule, population = cohort
    again = fitted(bags, members, schedule)
    for a, b in zip(jax.tree.leaves(population.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux counts what is mapped")
def test_another_task_of_the_same_form_compiles_nothing(cohort):
    """Names are no part of a program: the demo's three tasks would be compiled three times."""
    bags, _, members, schedule, _ = cohort
    packed, before = pack(bags), population._compiled.cache_info().misses
    other = Tasks((Task("grade", "classes", ("low", "high")),))
    fit(HEAD, other, packed, members, dataclasses.replace(schedule, epochs=1), progress=False)
    assert population._compiled.cache_info().misses == before
    third = Tasks((Task("grade", "labels", ("low", "high")),))
    fit(HEAD, third, packed, members, dataclasses.replace(schedule, epochs=1), progress=False)
    assert population._compiled.cache_info().misses > before


def test_programs_are_let_go_before_they_fill_the_process(cohort, monkeypatch):
    bags, _, members, _, _ = cohort

    def mapped():
        return Path("/proc/self/maps").read_bytes().count(b"\n")

    first = fitted(bags, members.take([0]), Schedule(1))
    before = mapped()
    monkeypatch.setattr(population, "MAPS", 0)
    again = fitted(bags, members.take([0]), Schedule(1))
    assert mapped() < before + 100  # compiled again, in the room of those let go
    np.testing.assert_array_equal(first.losses, again.losses)


def test_held_out_bags_leave_no_trace(cohort):
    bags, _, members, _, _ = cohort
    changed = [
        bag * 9 + 5 if part == TEST else bag
        for bag, part in zip(bags, members.parts[0], strict=True)
    ]
    a, b = (fitted(x, members.take([0]), Schedule(3, batch=4)) for x in (bags, changed))
    for one, other in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_members_that_take_turns_end_where_those_at_once_do(cohort, monkeypatch):
    """Bags too large for all members at once: of six two threes, of five four and one; on a CPU one by one."""
    bags, _, members, _, _ = cohort
    assert len(members) == 6
    at_once = fitted(bags, members, Schedule(2)).losses
    with monkeypatch.context() as few:
        few.setattr(population, "GROUP_BYTES", 4 * 6 * 4 * 40 * 64)
        in_turns = fitted(bags, members, Schedule(2)).losses
        np.testing.assert_allclose(in_turns, at_once, atol=1e-4)
        in_turns = fitted(bags, members.take(slice(5)), Schedule(2)).losses
        np.testing.assert_allclose(in_turns, at_once[:, :5], atol=1e-4)
    monkeypatch.setattr(population, "CPU_BYTES", 0)
    in_turns = fitted(bags, members, Schedule(2)).losses
    np.testing.assert_allclose(in_turns, at_once, atol=1e-4)


def test_weights_balance_classes_and_cases():
    cases = ["a", "a", "b", "c", "d", "e"]
    labels = np.array([0, 0, 0, 1, 1, 1])
    parts = np.array([TRAIN] * 4 + [TEST, TRAIN])
    weights = bag_weights(parts, labels, cases)
    assert weights[4] == 0
    assert np.isclose(weights[labels == 0].sum(), weights[labels == 1].sum())
    assert np.isclose(weights[0] + weights[1], weights[2])
    assert np.isclose(weights.sum(), 5)


@pytest.mark.parametrize("patience", [0, 2])
def test_a_validation_part_chooses_the_epoch(patience):
    """The validation bags are labelled wrongly, so that the loss on them rises as training goes on."""
    bags, labels, cases = planted(n=24, witnesses=6)
    parts = np.where(np.arange(24) < 14, TRAIN, np.where(np.arange(24) < 20, VALIDATION, TEST))
    wrong = np.where(parts == VALIDATION, 1 - labels, labels)
    kept = fitted(bags, members_of(parts[None], wrong, cases), Schedule(12, 4, patience))
    validation = kept.history[0, :, 1]
    assert np.nanargmin(validation) == kept.best[0] < 3
    assert np.isnan(validation[int(kept.best[0]) + 3 :]).all() == bool(patience)
    pairs = np.argwhere(parts[None] == VALIDATION)
    scores = TASKS.each[0].predict(predict(kept, pack(bags), pairs)[0])
    own = np.take_along_axis(scores, wrong[pairs[:, 1]][:, None], 1)[:, 0]
    per_class = [np.mean(-np.log(own[wrong[pairs[:, 1]] == c])) for c in (0, 1)]
    assert np.isclose(np.mean(per_class), np.nanmin(validation), atol=1e-4)


def test_uneven_bags_train_in_buckets_and_predict_on_all_instances():
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(n, 3)).astype(np.float32) for n in [900, 40, 50, 60, 30, 45]]
    labels, cases = np.array([0, 1] * 3), list("abcdef")
    members = members_of(np.array([[TEST, TRAIN, TRAIN, TRAIN, TRAIN, TEST]]), labels, cases)
    trained = fit(HEAD, TASKS, pack(bags, most=64), members, Schedule(2), progress=False)
    logits, attention = predict(trained, pack(bags), np.array([[0, 0], [0, 5]]))
    assert [a.shape[1] for a in attention] == [900, 45]
    assert np.isfinite(logits).all() and np.isclose(attention[0].sum(), 1, atol=1e-4)


def test_standardisation_is_of_the_training_bags_and_spares_constant_features():
    bags = [np.array([[1, 7.7], [3, 7.7]]), np.array([[100, 0]]), np.array([[5, 7.7]])]
    mean, std = population.standardisation(pack(bags), np.array([[TRAIN, TEST, TRAIN]]))
    np.testing.assert_allclose(mean, [[3, 7.7]], rtol=1e-6)
    np.testing.assert_allclose(std, [[np.sqrt(8 / 3), 1]], rtol=1e-6)


def test_streamed_bags_give_the_same_to_the_bit():
    """In runs of other sizes than memory holds, with validation, and with the last batch of a bucket filled up."""
    bags, labels, cases = planted(n=26, m=40)
    bags = [bag[: 12 + 20 * (i % 2)] for i, bag in enumerate(bags)]
    parts = np.where(np.arange(26) % 5 == np.arange(2)[:, None], TEST, TRAIN)
    parts[:, 20:] = VALIDATION
    members = members_of(parts, labels, cases)
    kept, streamed = (
        fit(HEAD, TASKS, pack(bags), members, Schedule(3, 4), resident=size, progress=False)
        for size in (None, 0)
    )
    np.testing.assert_array_equal(streamed.losses, kept.losses)
    np.testing.assert_array_equal(streamed.history, kept.history)
    for one, other in zip(
        jax.tree.leaves(kept.params), jax.tree.leaves(streamed.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_eight_devices_end_where_one_does(tmp_path: Path):
    """Six members on eight fake devices, two of them idle; and on 2 x 4, where four share the instances of a bag."""
    code = (
        "import sys, numpy as np; sys.path[:0] = [sys.argv[2]]; import test_population as t\n"
        "spread = int(sys.argv[3])\n"
        "bags, labels, cases = t.planted(n=16)\n"
        "parts = np.where(np.arange(16) % 4 == np.arange(3)[:, None], t.TEST, t.TRAIN)\n"
        "parts[:, 12:] = np.where(parts[:, 12:] == t.TRAIN, t.VALIDATION, t.TEST)\n"
        "packed = t.pack(bags, multiple=spread)\n"
        "got = t.fit(t.HEAD, t.TASKS, packed, t.members_of(parts, labels, cases, seeds=2),\n"
        "    t.Schedule(2, batch=2), instances=spread, progress=False)\n"
        "np.savez(sys.argv[1], losses=got.losses, history=got.history,\n"
        "    kernel=got.params['embed']['kernel'])\n"
    )
    found = []
    for devices, spread in ((1, 1), (8, 1), (8, 4)):
        out = tmp_path / f"{devices}-{spread}.npz"
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        subprocess.run(
            [sys.executable, "-c", code, str(out), str(Path(__file__).parent), str(spread)],
            env={**os.environ, "XLA_FLAGS": flags},
            check=True,
        )
        found.append(np.load(out))
    for other in found[1:]:
        np.testing.assert_allclose(other["losses"], found[0]["losses"], atol=1e-5)
        np.testing.assert_allclose(other["history"], found[0]["history"], atol=1e-5)
        np.testing.assert_allclose(other["kernel"], found[0]["kernel"], rtol=1e-3, atol=1e-4)


def test_more_devices_a_bag_than_there_are_are_refused():
    with pytest.raises(UserError, match="spread over 3 devices"):
        population.mesh_of(3)


@pytest.mark.parametrize(
    ("options", "said"),
    [("depth=2", "abmil has no 'depth'"), ("heads=many", "not int"), ("gated=maybe", "not bool")],
)
def test_a_wrong_option_of_a_head_is_named(options, said):

    with pytest.raises(UserError, match=said):
        make("abmil", 2, {}, options)
    made = make("abmil", 2, dict(hidden=8), "heads=3,gated=false,embed=16x8")
    assert (made.heads, made.gated, made.embed) == (3, False, (16, 8))
    assert dataclasses.replace(made, outputs=4).outputs == 4


def test_the_validation_loss_is_that_of_each_members_own_part():
    """Parts of other sizes, none at all, a number beside the classes, and a risk set without an event."""
    tasks = Tasks((Task("y", "classes", ("a", "b")), Task("n", "number"), Task("os", "cox")))
    rng = np.random.default_rng(0)
    parts = np.full((4, 12), TRAIN)
    parts[0, :5], parts[1, 3:12], parts[3, [1, 2]] = VALIDATION, VALIDATION, VALIDATION
    targets = np.stack([rng.integers(0, 2, (4, 12)), rng.normal(size=(4, 12)), rng.uniform(1, 9, (4, 12)), rng.integers(0, 2, (4, 12))], -1).astype(np.float32)  # fmt: skip
    targets[0, 0, 0], targets[3, :, :2], targets[3, :, 3] = np.nan, np.nan, 0
    logits = rng.normal(size=(4, 12, 4)).astype(np.float32)
    members = population.Members(parts, targets, np.zeros((4, 12, 3)), *[np.zeros(4)] * 3)
    found = population._validation_loss(tasks, logits, population._held(tasks, members))
    for i in range(2):
        mine = parts[i] == VALIDATION
        weight = population.balance(tasks, targets[i, mine])
        total = tasks.loss(logits[i, mine], targets[i, mine], weight)
        np.testing.assert_allclose(found[i], float(total) / weight.sum(), rtol=1e-5)
    assert np.isnan(found[2:]).all()
