"""Label tables of several tools are read alike, and what cannot be meant is refused by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathme_jax.errors import UserError
from pathme_jax.records.labels import read_labels


def table(folder, text, name="labels.csv"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_plain_table(tmp_path):
    found = read_labels(table(tmp_path, "case_id,slide_id,y\nb,s2,pos\na,s1,neg\na,s0,neg\n"), "y")
    assert found.slide_ids == ["s0", "s1", "s2"]
    assert found.case_ids == ["a", "a", "b"]
    assert found.classes == ["neg", "pos"]
    assert found.labels.tolist() == [0, 0, 1]
    assert found.notes == [] and found.folds == {}


@pytest.mark.parametrize("case", ["P_ID", "PATIENT", "patient", "patient_id"])
@pytest.mark.parametrize("slide", ["slide", "FILENAME"])
def test_aliases_are_normalised_and_said(tmp_path, case, slide):
    found = read_labels(table(tmp_path, f"{case},{slide},y\na,s1.svs,1\nb,s2.h5,0\n"), "y")
    assert found.case_ids == ["a", "b"] and found.slide_ids == ["s1", "s2"]
    assert len(found.notes) == 2


def test_a_dot_in_a_slide_id_is_not_a_suffix(tmp_path):
    found = read_labels(table(tmp_path, "case_id,slide_id,y\na,TCGA-1.0f3e,1\nb,x.tiff,0\n"), "y")
    assert found.slide_ids == ["TCGA-1.0f3e", "x"]


def test_patho_bench_tsv_without_slide_column(tmp_path):
    text = "case_id\ty\tfold_0\tfold_1\na\t1\ttrain\ttest\nb\t0\ttest\ttrain\n"
    found = read_labels(table(tmp_path, text, "k=all.tsv"), "y")
    assert found.slide_ids == ["a", "b"]
    assert found.folds == {"fold_0": ["train", "test"], "fold_1": ["test", "train"]}
    assert "no slide column" in found.notes[0]


def test_fold_columns_are_in_numeric_order_and_a_number_column_is_expanded(tmp_path):
    wide = "case_id,slide_id,y,fold_10,fold_2\na,s1,1,train,val\nb,s2,0,,test\n"
    assert list(read_labels(table(tmp_path, wide), "y").folds) == ["fold_2", "fold_10"]
    assert read_labels(table(tmp_path, wide), "y", fold_prefix="").folds == {}
    single = "case_id,slide_id,y,fold\na,s1,1,0\nb,s2,0,1\n"
    folds = read_labels(table(tmp_path, single), "y").folds
    assert folds == {"fold 0": ["test", "train"], "fold 1": ["train", "test"]}


def test_blank_labels_leave_their_slides_out_and_numbers_sort_as_numbers(tmp_path):
    text = "case_id,slide_id,y\na,s1,10\nb,s2,\nc,s3,2\nd,s4,2.0\ne,s5,nan\n"
    found = read_labels(table(tmp_path, text), "y")
    assert found.unlabelled == ["s2", "s5"]
    assert found.classes == ["2", "10"]
    assert found.labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "text, words",
    [
        ("case_id,slide_id,y\na,s1,1\nb,s1.svs,0\n", ["'s1'", "more than one row"]),
        ("case_id,slide_id,y\na,s1,1\na,s2,0\n", ["'a'", "'1'", "'0'"]),
        ("case_id,slide_id,z,w\na,s1,1,2\n", ["'y'", "z, w"]),
        ("foo,y\na,1\n", ["neither a case nor a slide", "foo"]),
        ("case_id,slide_id,y\n", ["no rows"]),
        ("case_id,slide_id,y\na,s1,\n", ["blank in every row"]),
        ("case_id,slide_id,y,fold_0\na,s1,1,maybe\n", ["fold_0", "'s1'", "'maybe'"]),
        ("case_id,slide_id,y,fold\na,s1,1,A\n", ["fold", "'s1'", "'A'"]),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        read_labels(table(tmp_path, text), "y")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no\.csv"):
        read_labels(tmp_path / "no.csv", "y")


@given(text=st.text(max_size=200))
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    path.write_text("case_id,slide_id,y\n" + text, encoding="utf-8", errors="replace", newline="")
    try:
        found = read_labels(path, "y")
    except UserError:
        return
    assert len(found.slide_ids) == len(found.labels) == len(set(found.slide_ids)) > 0
