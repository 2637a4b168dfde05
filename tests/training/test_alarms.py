"""Each alarm is raised by what it names, a healthy run raises none, and none is repeated at once."""

import math

import pytest

from pathme_jax.training.alarms import Alarms

K = 4096
HEALTHY = {
    "loss": 10.0,
    "teacher_entropy": 0.5 * math.log(K),
    "prototype_usage": 0.7,
    "feature_std": 0.6,
    "grad_norm": 2.0,
}
TIMING = {"samples_per_second": 100.0, "data_wait": 0.02}


def raised(rows, settle=0, first=100, every=50):
    """[(row, alarm name)] of a list of changes to the healthy values, a row a logged step."""
    alarms = Alarms(settle, K, every)
    found = []
    for i, row in enumerate(rows):
        metrics = {k: row.get(k, v) for k, v in HEALTHY.items()}
        timing = {k: row.get(k, v) for k, v in TIMING.items()}
        found += [(i, alarm.name) for alarm in alarms(first + i, metrics, timing)]
    return found


@pytest.mark.parametrize(
    ("name", "ill"),
    [
        ("collapse", {"feature_std": 0.02}),
        ("few_prototypes", {"prototype_usage": 0.1}),
        ("uniform_teacher", {"teacher_entropy": 0.999 * math.log(K)}),
        ("hard_teacher", {"teacher_entropy": 0.01}),
        ("data_wait", {"data_wait": 0.4}),
    ],
)
def test_what_stays_ill_raises_its_alarm_and_a_blip_does_not(name, ill):
    assert [alarm for _, alarm in raised([{}] * 5 + [ill] * 5)] == [name]
    assert raised([{}] * 5 + [ill] * 2 + [{}] * 10) == []


def test_a_healthy_run_is_silent():
    assert raised([{"grad_norm": 2 + i % 5} for i in range(200)]) == []


def test_a_gradient_ten_times_its_usual_norm_is_told_at_once_but_not_before_the_usual_is_known():
    assert raised([{}] * 20 + [{"grad_norm": 30.0}]) == [(20, "gradient")]
    assert raised([{}] * 20 + [{"grad_norm": 15.0}]) == []
    assert raised([{}] * 5 + [{"grad_norm": 30.0}]) == []


def test_a_fresh_model_that_has_not_settled_is_not_ill():
    """At first features coincide and the teacher is uniform; starving is told all the same."""
    ill = {"feature_std": 1e-4, "teacher_entropy": math.log(K), "prototype_usage": 0.05}
    assert raised([ill] * 50, settle=150) == []
    assert {name for _, name in raised([ill] * 60, settle=150)} == {
        "collapse",
        "few_prototypes",
        "uniform_teacher",
    }
    assert raised([{"data_wait": 0.5}] * 6, settle=10**6) == [(4, "data_wait")]


def test_an_alarm_is_repeated_only_after_a_while():
    found = raised([{"feature_std": 0.01}] * 45, every=20)
    assert [row for row, _ in found] == [4, 24, 44]


def test_a_method_that_logs_none_of_it_raises_none():
    alarms = Alarms(0)
    for step in range(30):
        assert alarms(step, {"loss": 1.0}, {}) == []


def test_the_method_may_log_its_number_of_prototypes():
    alarms = Alarms(0)
    row = {"teacher_entropy": math.log(64), "prototypes": 64.0}
    found = [alarms(step, row, {}) for step in range(5)][-1]
    assert [alarm.name for alarm in found] == ["uniform_teacher"]


def test_an_alarm_reads_as_one_line_with_what_is_seen_and_a_cure():
    alarms = Alarms(0, K)
    found = [alarms(i, {**HEALTHY, "prototype_usage": 0.1}, {}) for i in range(5)][-1]
    line = str(found[0])
    assert "prototype_usage 0.1, about 2 of 4096 prototypes" in line and "Sinkhorn" in line
    assert "\n" not in line
