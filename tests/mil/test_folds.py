"""Folds: no patient on two sides, every class on both, as balanced as can be, the same every time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathme_jax.errors import UserError
from pathme_jax.mil.folds import TEST, TRAIN, VALIDATE_FROM, VALIDATION, stratified
from pathme_jax.mil.folds import given as from_columns
from pathme_jax.records.labels import Labels

COHORTS = st.lists(  # per class, the number of slides of each case
    st.lists(st.integers(1, 3), min_size=2, max_size=30), min_size=2, max_size=3
)


def cohort(slides_of):
    cases, labels = [], []
    for label, counts in enumerate(slides_of):
        for i, n in enumerate(counts):
            cases += [f"{label}-{i}"] * n
            labels += [label] * n
    return cases, np.array(labels)


@given(slides_of=COHORTS, folds=st.integers(2, 6), seed=st.integers(0, 99))
def test_patients_are_never_split_and_every_class_is_tested(slides_of, folds, seed):
    cases, labels = cohort(slides_of)
    names = [str(i) for i in range(len(slides_of))]
    parts = stratified(cases, labels, names, folds, seed)
    assert len(parts) == min(folds, *map(len, slides_of))
    for part in parts:
        for case in set(cases):
            assert len({p for p, c in zip(part, cases, strict=True) if c == case}) == 1
        for label in np.unique(labels):
            assert (part[labels == label] == TEST).any()
            assert (part[labels == label] == TRAIN).any()
    assert ((parts == TEST).sum(0) == 1).all()
    np.testing.assert_array_equal(parts, stratified(cases, labels, names, folds, seed))


@given(slides_of=COHORTS, folds=st.integers(2, 6))
def test_folds_differ_by_at_most_a_case(slides_of, folds):
    cases, labels = cohort([[1] * len(counts) for counts in slides_of])
    parts = stratified(cases, labels, [str(i) for i in range(len(slides_of))], folds, 0)
    tested = parts == TEST
    assert np.ptp(tested.sum(1)) <= 1
    for label in np.unique(labels):
        assert np.ptp(tested[:, labels == label].sum(1)) <= 1


def test_a_validation_part_only_where_cases_suffice():
    cases, labels = cohort([[1] * 30, [1] * 30])
    parts = stratified(cases, labels, ["a", "b"], 5, 0)
    for part in parts:  # 24 of each class are left to train: a fifth is validated
        assert [(part[labels == y] == VALIDATION).sum() for y in (0, 1)] in ([4, 5], [5, 5], [5, 4])
    few, labels = cohort([[1] * (VALIDATE_FROM - 1)] * 2)
    assert not (stratified(few, labels, ["a", "b"], 5, 0) == VALIDATION).any()


def test_order_of_the_rows_does_not_matter():
    cases, labels = cohort([[1] * 7, [2] * 6])
    order = np.random.default_rng(0).permutation(len(cases))
    parts = stratified(cases, labels, ["a", "b"], 4, 3)
    shuffled = stratified([cases[i] for i in order], labels[order], ["a", "b"], 4, 3)
    np.testing.assert_array_equal(shuffled, parts[:, order])


def test_too_little_to_cross_validate_is_refused():
    with pytest.raises(UserError, match=r"'b' has 1 case.*cannot cross-validate"):
        stratified(["1", "2", "3"], np.array([0, 0, 1]), ["a", "b"], 5, 0)
    with pytest.raises(UserError, match="only one class, 'b'"):
        stratified(["1", "2"], np.array([1, 1]), ["a", "b"], 5, 0)


def table(cases, labels, folds):
    slides = [f"s{i}" for i in range(len(cases))]
    return Labels("y", ["0", "1"], slides, cases, np.array(labels), folds, [], [])


def two_of(labels):
    return lambda train: "" if len(set(labels[train])) > 1 else "fewer than two classes"


def test_the_users_folds_are_taken_as_they_are():
    folds = {"fold_0": ["train", "train", "val", "test", ""]}
    labels = table(list("abcde"), [0, 1, 0, 1, 0], folds)
    parts, skipped = from_columns(labels, [0, 1, 2, 3, 4], two_of(labels.labels))
    assert parts["fold_0"].tolist() == [TRAIN, TRAIN, VALIDATION, TEST, 0] and skipped == []


@pytest.mark.parametrize("other", ["val", "train", ""])
def test_a_leaking_patient_is_named(other):
    labels = table(list("abcc"), [0, 1, 0, 0], {"fold_0": ["train", "train", "test", other]})
    with pytest.raises(UserError, match="fold_0: patient 'c' is in both test and"):
        from_columns(labels, [0, 1, 2], two_of(labels.labels[:3]))


def test_a_fold_that_lost_its_slides_is_left_out_and_said():
    first, second = ["train", "train", "train", "test"], ["test", "train", "train", "train"]
    labels = table(list("abcd"), [0, 1, 0, 1], {"fold_0": first, "fold_1": second})
    rows = [0, 1, 2]  # d has no features
    parts, skipped = from_columns(labels, rows, two_of(labels.labels[rows]))
    assert {name: part.tolist() for name, part in parts.items()} == {"fold_1": [TEST, TRAIN, TRAIN]}
    assert skipped == ["fold_0: no slide with features is tested"]
    rows = [0, 2]  # nothing of class 1 is left
    with pytest.raises(UserError, match="no fold of fold_0, fold_1 can be used"):
        from_columns(labels, rows, two_of(labels.labels[rows]))
