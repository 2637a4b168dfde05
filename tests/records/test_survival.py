"""Survival tables of every tool mean the same months and events; what is not certain is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathme_jax.errors import UserError
from pathme_jax.records.survival import MONTH, bin_of, quantile_edges, read_survival

MONTHS, EVENT = [1.0, 20.0, 3.5], [1, 0, 1]


def write(path, columns, *rows):
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def days(months):
    return f"{months * MONTH:.6f}"


TABLES = {
    "MCAT": ("case_id,slide_id,survival_months,censorship", "{m},{c}", "", "event: 1 - censorship"),
    "SurvPath dss": (
        "case_id,slide_id,survival_months_dss,censorship_dss",
        "{m},{c}",
        "dss",
        "1 - censorship_dss",
    ),
    "PANTHER": (
        "case_id,slide_id,os_survival_days,os_censorship",
        "{d},{c}",
        "os",
        "time: os_survival_days, days -> months; event: 1 - os_censorship",
    ),
    "Patho-Bench": ("case_id,slide_id,OS_event,OS_days", "{e},{d}", "OS", "event: OS_event"),
    "cBioPortal": ("PATIENT,slide,OS_MONTHS,OS_STATUS", "{m},{s}", "os", "event: OS_STATUS"),
    "words": ("patient_id,slide_id,survival_years,vital_status", "{y},{w}", "", "years -> months"),
    "both": (
        "case_id,slide_id,event,censorship,survival_months",
        "{e},{c},{m}",
        "",
        "(censorship agrees)",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_tools_table_is_the_same_months_and_events(tmp_path, name):
    columns, row, task, note = TABLES[name]
    rows = [
        f"p{i},s{i},"
        + row.format(
            m=m,
            d=days(m),
            y=m / 12,
            e=e,
            c=float(1 - e),
            s=("0:LIVING", "1:DECEASED")[e],
            w=("Alive", "Dead")[e],
        )
        for i, (m, e) in enumerate(zip(MONTHS, EVENT, strict=True))
    ]
    found = read_survival(write(tmp_path / "t.csv", columns, *rows), task)
    np.testing.assert_allclose(found.time, MONTHS, rtol=1e-6)
    assert found.event.tolist() == EVENT
    assert found.case_ids == ["p0", "p1", "p2"]
    assert any(note in told for told in found.notes), found.notes


def test_one_endpoint_of_several_is_read_and_none_is_guessed(tmp_path):
    columns = (
        "case_id,slide_id,os_survival_days,os_censorship,dss_survival_days,dss_censorship,age_years"
    )
    path = write(tmp_path / "t.csv", columns, f"p,s,{days(2)},0,{days(1)},1,60")
    assert read_survival(path, "dss").event.tolist() == [0]
    with pytest.raises(UserError, match="recognised: 'os', 'dss'"):
        read_survival(path)


def test_names_that_say_nothing_are_told_by_the_user(tmp_path):
    path = write(
        tmp_path / "t.csv", "PATIENT,FILENAME,lived,outcome", "p,s.h5,14,event", "q,r.h5,3,censored"
    )
    with pytest.raises(UserError, match="no time column recognised"):
        read_survival(path)
    with pytest.raises(UserError, match="does not say whether it holds days"):
        read_survival(path, time="lived", event="outcome")
    found = read_survival(path, time="lived", event="outcome", unit="months")
    assert found.slide_ids == ["r", "s"] and found.event.tolist() == [0, 1]


def test_two_time_columns_are_not_chosen_between(tmp_path):
    path = write(
        tmp_path / "t.csv", "case_id,slide_id,survival_months,survival_days,event", "p,s,1,30,1"
    )
    with pytest.raises(UserError, match="survival_months and survival_days could all be the time"):
        read_survival(path)
    assert read_survival(path, time="survival_months").time.tolist() == [1.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,1,0", "survival_months of patient 'bad' (slide 's2') is '0'"),
        ("-3,1,0", "is '-3'"),
        ("nan,1,0", "is 'nan'"),
        (",1,0", "is ''"),
        ("inf,1,0", "is 'inf'"),
        ("5,perhaps,0", "event of patient 'bad' (slide 's2') is 'perhaps'"),
        ("5,2,0", "is '2'"),
        ("5,1,1", "contradict each other"),
        ("5,,0", "event of patient 'bad'"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_patient(tmp_path, row, message):
    path = write(
        tmp_path / "cohort.csv",
        "case_id,slide_id,survival_months,event,censorship",
        "good,s1,4,1,0",
        f"bad,s2,{row}",
    )
    with pytest.raises(UserError) as refused:
        read_survival(path)
    assert message in refused.value.problem and "cohort.csv" in refused.value.problem


def test_a_number_and_word_that_disagree_are_refused(tmp_path):
    path = write(tmp_path / "t.csv", "case_id,slide_id,months,status", "p,s,4,1:LIVING")
    with pytest.raises(UserError, match="1:LIVING"):
        read_survival(path)


def test_slides_of_a_patient_must_agree_and_blank_rows_are_left_out(tmp_path):
    columns = "case_id,slide_id,survival_months,event,fold_0"
    path = write(
        tmp_path / "t.csv",
        columns,
        "p,s1,4,1,train",
        "p,s2,4,1,train",
        "q,s3,,,test",
        "r,s4,5,0,test",
    )
    found = read_survival(path)
    assert found.unlabelled == ["s3"] and found.folds == {"fold_0": ["train", "train", "test"]}
    path = write(tmp_path / "u.csv", columns, "p,s1,4,1,train", "p,s2,6,1,train")
    with pytest.raises(
        UserError, match="'p' has survival_months '4' on slide 's1' and '6' on 's2'"
    ):
        read_survival(path)


def test_two_ways_to_write_one_time_agree_and_an_event_that_differs_is_named(tmp_path):
    columns = "case_id,slide_id,survival_months,status"
    path = write(tmp_path / "t.csv", columns, "p,s1,4,dead", "p,s2,4.0,1:DECEASED")
    assert read_survival(path).event.tolist() == [1, 1]
    path = write(tmp_path / "u.csv", columns, "p,s1,4,dead", "p,s2,4,alive")
    with pytest.raises(UserError, match="'p' has status 'dead' on slide 's1' and 'alive' on 's2'"):
        read_survival(path)


def test_a_patient_on_two_sides_of_a_fold_is_refused(tmp_path):
    columns = "case_id,slide_id,survival_months,event,fold_0"
    path = write(tmp_path / "t.csv", columns, "p,s1,4,1,train", "p,s2,4,1,test")
    with pytest.raises(UserError, match="fold_0: patient 'p' is in both train and test"):
        read_survival(path)
    assert read_survival(path, fold_prefix="").folds == {}


CASES = st.sampled_from(["a", "b", "c", ""])
TIMES = st.sampled_from(["4", "1", "4.0", "", "2"]) | st.sampled_from(["0", "-1", "1e308", "x"])
STATES = st.sampled_from(["1", "0", "dead", "0:LIVING", ""]) | st.sampled_from(["x", "1:LIVING"])


@given(rows=st.lists(st.tuples(CASES, TIMES, STATES), max_size=5), random=st.randoms())
def test_any_rows_in_any_order_are_read_alike_or_refused(tmp_path_factory, rows, random):
    folder = tmp_path_factory.mktemp("survival")
    rows = [(f"s{i}", *row) for i, row in enumerate(rows)]

    def read(name, lines):
        columns = "slide_id,case_id,os_years,os_event"
        return read_survival(write(folder / name, columns, *map(",".join, lines)), "os")

    shuffled = list(rows)
    random.shuffle(shuffled)
    try:
        found = read("a.csv", rows)
    except UserError:
        with pytest.raises(UserError):
            read("b.csv", shuffled)
        return
    again = read("b.csv", shuffled)
    assert np.all(np.isfinite(found.time)) and np.all(found.time > 0)
    assert set(found.event.tolist()) <= {0, 1} and found.slide_ids == again.slide_ids
    assert found.time.tolist() == again.time.tolist() and found.case_ids == again.case_ids


def test_bins_are_quartiles_of_the_uncensored_times_as_pandas_cuts_them():
    import importlib.util
    import json
    from pathlib import Path

    references = Path(__file__).parents[1] / "references"
    spec = importlib.util.spec_from_file_location("make_survival", references / "make_survival.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    stored = json.loads((references / "survival.json").read_text())
    for name in make.COHORTS:
        c = make.cohort(name)
        edges = quantile_edges(c["time"], c["event"])
        np.testing.assert_allclose(edges[1:-1], stored[name]["edges"], atol=1e-8)
        assert edges[0] == 0 and edges[-1] == c["time"].max()


def test_a_bin_holds_its_left_edge_and_the_last_one_all_that_follows():
    edges = np.array([0.0, 2.0, 4.0, 6.0, 9.0])
    assert bin_of(np.array([0.5, 2.0, 3.9, 6.0, 9.0, 50.0]), edges).tolist() == [0, 1, 1, 3, 3, 3]


@pytest.mark.parametrize("event", [[0] * 8, [1, 1, 1] + [0] * 5])
def test_too_few_events_for_the_bins_are_refused(event):
    with pytest.raises(UserError, match="do not fill 4 time bins"):
        quantile_edges(np.arange(1.0, 9.0), np.array(event))


def test_tied_events_that_leave_a_bin_empty_are_refused():
    with pytest.raises(UserError, match="at 2 distinct times"):
        quantile_edges(np.array([3.0] * 6 + [5.0] * 2), np.ones(8))
