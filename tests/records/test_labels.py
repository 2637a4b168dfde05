"""Label tables of several tools are read alike, and what cannot be meant is refused by name."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathme_jax.errors import UserError
from pathme_jax.records.labels import read_labels, read_multilabel, read_number


def table(folder, text, name="labels.csv"):
    path = folder / name
    path.write_bytes(text.encode())
    return path


def refusal(read, *arguments, **named):
    with pytest.raises(UserError) as error:
        read(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what all kinds share


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
    text = "case_id,slide_id,y\na,TCGA-1.0f3e,1\nb,x.tiff,0\nc,.svs,0\nd,z.svs/,0\n"
    found = read_labels(table(tmp_path, text), "y")
    assert found.slide_ids == [".svs", "TCGA-1.0f3e", "x", "z.svs/"]


PLAIN = 'case_id,slide_id,"y",note\na,s1,"one, or so","x, y"\nb,s2,two,\n'


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (PLAIN, "l.csv"),
        (PLAIN.replace("\n", "\r\n"), "l.csv"),
        ("\ufeff" + PLAIN, "l.csv"),
        (PLAIN.replace("a,s1,", " a , s1.svs\t, ").replace("two", " two "), "l.csv"),
        (PLAIN + ",,,\n\n", "l.csv"),
        (PLAIN.replace(",", "\t").replace("\t or", ", or").replace("x\t", "x,"), "l.tsv"),
        (PLAIN.replace(",", "\t").replace("\t or", ", or").replace("x\t", "x,"), "l.TXT"),
        (PLAIN.replace(",", ";").replace("; or", ", or").replace("x;", "x,"), "l.csv"),
    ],
    ids=["plain", "CRLF", "BOM", "spaces", "blank lines", "tsv", "tabs in txt", "semicolons"],
)
def test_however_the_table_was_saved_it_is_the_same(tmp_path, text, name):
    found = read_labels(table(tmp_path, text, name), "y")
    assert found.slide_ids == ["s1", "s2"] and found.case_ids == ["a", "b"]
    assert found.classes == ["one, or so", "two"] and found.notes == []


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
    single = "case_id,slide_id,y,fold\na,s1,1,0.0\nb,s2,0,1\nc,s3,0,\n"
    folds = read_labels(table(tmp_path, single), "y").folds
    assert folds == {"fold 0": ["test", "train", ""], "fold 1": ["train", "test", ""]}


def test_rows_without_a_slide_are_left_out_and_said(tmp_path):
    found = read_labels(table(tmp_path, "case_id,slide_id,y\na,s1,1\nb,,0\nc,s3,0\n"), "y")
    assert found.slide_ids == ["s1", "s3"]
    assert found.notes == ["1 rows without slide_id are left out"]


# --- classes


def test_blank_labels_leave_their_slides_out_and_numbers_sort_as_numbers(tmp_path):
    text = "case_id,slide_id,y\na,s1,10\nb,s2,\nc,s3,2\nd,s4,2.0\ne,s5,nan\n"
    found = read_labels(table(tmp_path, text), "y")
    assert found.unlabelled == ["s2", "s5"]
    assert found.classes == ["2", "10"]
    assert found.labels.tolist() == [1, 0, 0]


def test_long_numbers_stay_different_classes(tmp_path):
    text = "case_id,slide_id,y\na,s1,12345678\nb,s2,12345679\n"
    assert read_labels(table(tmp_path, text), "y").classes == ["12345678", "12345679"]


def test_classes_keep_the_order_given_and_a_label_outside_them_is_refused(tmp_path):
    path = table(tmp_path, "case_id,slide_id,y\na,s1,low\nb,s2,high\nc,s3,low\n")
    found = read_labels(path, "y", classes=["low", "mid", "high"])
    assert found.classes == ["low", "mid", "high"] and found.labels.tolist() == [0, 2, 0]
    assert found.notes == ["no slide is 'mid'"]
    said = refusal(read_labels, path, "y", classes=["low", "mid"])
    assert "y of slide 's2' is 'high', an unknown label" in said and "low, mid" in said


def test_classes_that_are_numbers_match_however_they_are_written(tmp_path):
    path = table(tmp_path, "case_id,slide_id,y\na,s1,1.0\nb,s2,00\nc,s3,x\n")
    assert "slide 's3' is 'x', an unknown label" in refusal(
        read_labels, path, "y", classes=["1", "0"]
    )
    path = table(tmp_path, "case_id,slide_id,y\na,s1,1.0\nb,s2,00\n")
    found = read_labels(path, "y", classes=["01", "0.0"])
    assert found.labels.tolist() == [0, 1] and found.classes == ["1", "0"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("case_id,slide_id,y\na,s1,1\nb,s1.svs,0\n", ["'s1'", "more than one row"]),
        ("case_id,slide_id,y\na,s1,1\na,s2,0\n", ["'a'", "'1' on slide 's1'", "'0' on 's2'"]),
        ("case_id,slide_id,z,w\na,s1,1,2\n", ["'y'", "z, w"]),
        ("foo,y\na,1\n", ["neither a case nor a slide", "foo"]),
        ("case_id,slide_id,y\n", ["no rows"]),
        ("", ["no rows"]),
        ('case_id,slide_id,y\na,s1,1\nb,s2,"0\nc,s3,0\n', ["every quote closed"]),
        ("case_id,slide_id,y,y\na,s1,1,0\n", ["'y' is there twice"]),
        ("case_id,slide_id,y\na,s1,\nb,s2,NA\n", ["column 'y' is blank in every row"]),
        ("case_id,slide_id,y\na,,1\nb,,0\n", ["column 'slide_id' is blank in every row"]),
        ("case_id,slide_id,y\na,s1,1\n,s2,0\n", ["slide 's2' has no case_id"]),
        ("case_id,slide_id,y\na,s1,b\nc,s2,b\n", ["only one class, 'b'", "'y'"]),
        ("case_id,slide_id,y,fold_0\na,s1,1,maybe\nb,s2,0,\n", ["fold_0", "'s1'", "'maybe'"]),
        ("case_id,slide_id,y,fold\na,s1,1,A\nb,s2,0,1\n", ["fold", "'s1'", "'A'"]),
        ("case_id,slide_id,y,fold\na,s1,1,1.5\nb,s2,0,1\n", ["fold", "'s1'", "'1.5'"]),
        (
            "case_id,slide_id,y,fold_0,fold_1\na,s1,1,train,test\na,s2,1,train,val\nb,s3,0,test,\n",
            ["fold_1: patient 'a' is in both test and val"],
        ),
        ("case_id,slide_id,y,fold\na,s1,1,0\na,s2,1,1\nb,s3,0,1\n", ["fold 0: patient 'a'"]),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path, text, words):
    said = refusal(read_labels, table(tmp_path, text), "y")
    assert all(word in said for word in ["labels.csv", *words]), said


def test_a_missing_file_a_folder_and_other_encodings_are_one_line(tmp_path):
    assert "no.csv" in refusal(read_labels, tmp_path / "no.csv", "y")
    assert "cannot be read" in refusal(read_labels, tmp_path, "y")
    (tmp_path / "latin.csv").write_bytes("case_id,y\nMüller,1\n".encode("latin-1"))
    assert "UTF-8" in refusal(read_labels, tmp_path / "latin.csv", "y")


# --- numbers


def test_numbers_are_read_and_blank_rows_left_out(tmp_path):
    text = "case_id,slide_id,hrd,fold_0\nb,s2,-1e2,test\na,s1,.5,train\nc,s3,,\na,s0,0.50,train\n"
    found = read_number(table(tmp_path, text), "hrd")
    assert found.task == "hrd" and found.slide_ids == ["s0", "s1", "s2"]
    assert found.values.tolist() == [0.5, 0.5, -100.0]
    assert found.unlabelled == ["s3"] and found.folds == {"fold_0": ["train", "train", "test"]}


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("high", ["hrd of slide 's2' is 'high'", "finite number"]),
        ("inf", ["'inf'"]),
        ("1e999", ["'1e999'"]),
        ("1_0", ["hrd of slide 's2' is '1_0'"]),
        ("٣", ["hrd of slide 's2' is '٣'"]),
        ('"0,5"', ["'0,5'", "decimal point, 0.5"]),
        ('"1,234.5"', ["'1,234.5'", "finite number"]),
        ("3", ["case 'a' has hrd '2' on slide 's1' and '3' on 's2'"]),
        ("2", ["column 'hrd' is 2 in every row"]),
    ],
)
def test_what_is_no_number_is_refused_with_its_cell(tmp_path, cell, words):
    said = refusal(
        read_number, table(tmp_path, f"case_id,slide_id,hrd\na,s1,2\na,s2,{cell}\n"), "hrd"
    )
    assert all(word in said for word in words), said


def test_a_decimal_comma_is_told_where_semicolons_separate(tmp_path):
    said = refusal(read_number, table(tmp_path, "case_id;hrd\na;0,5\nb;1,5\n"), "hrd")
    assert "decimal point, 0.5" in said


# --- several labels


def test_labels_that_hold_together_and_what_is_not_known(tmp_path):
    text = "case_id,slide_id,er,pr\nb,s2,neg,\na,s1,Positive,1.0\nc,s3,,\nd,s4,wt,FALSE\n"
    found = read_multilabel(table(tmp_path, text), ["pr", "er"])
    assert found.task == "pr+er" and found.names == ["pr", "er"]
    assert found.slide_ids == ["s1", "s2", "s4"] and found.unlabelled == ["s3"]
    np.testing.assert_array_equal(found.values, [[1, 1], [np.nan, 0], [0, 0]])


@pytest.mark.parametrize("one, zero", [("yes", "no"), ("true", "false"), ("mut", "wt"), ("1", "0")])
def test_the_usual_words_are_understood(tmp_path, one, zero):
    path = table(tmp_path, f"case_id,slide_id,er\na,s1,{one}\nb,s2,{zero.upper()}\n")
    assert read_multilabel(path, ["er"]).values.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("a,s1,1,0\nb,s2,0,low", ["pr of slide 's2' is 'low'", "negative", "positive"]),
        ("a,s1,1,0\nb,s2,2,1", ["er of slide 's2' is '2'"]),
        ("a,s1,1,0\na,s2,0,0\nb,s3,0,1", ["case 'a' has er '1' on slide 's1' and '0' on 's2'"]),
        ("a,s1,1,0\na,s2,,0\nb,s3,0,1", ["case 'a' has er '1' on slide 's1' and '' on 's2'"]),
        ("a,s1,1,0\nb,s2,1,1", ["label 'er' is 1 wherever known"]),
        ("a,s1,,0\nb,s2,,1", ["label 'er' is blank in every row"]),
        ("a,s1,,\nb,s2,,", ["column 'er', 'pr' is blank in every row"]),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(tmp_path, rows, words):
    said = refusal(
        read_multilabel, table(tmp_path, f"case_id,slide_id,er,pr\n{rows}\n"), ["er", "pr"]
    )
    assert all(word in said for word in words), said


def test_labels_must_be_there_and_named_once(tmp_path):
    path = table(tmp_path, "case_id,slide_id,er\na,s1,1\nb,s2,0\n")
    assert "no column 'her2'" in refusal(read_multilabel, path, ["er", "her2"])
    assert "each once" in refusal(read_multilabel, path, ["er", "er"])
    assert "one or more" in refusal(read_multilabel, path, [])


# --- whatever is given

READERS = {
    "classes": lambda path: read_labels(path, "y"),
    "known classes": lambda path: read_labels(path, "y", classes=["0", "1", "a"]),
    "number": lambda path: read_number(path, "y"),
    "labels": lambda path: read_multilabel(path, ["y", "z"]),
}
CASES = st.sampled_from(["a", "b", "c", "d", ""])
VALUES = st.sampled_from(["0", "1", "1.0", "", "0", "1"]) | st.sampled_from(["a", "2,5", "-", '"q'])
PARTS = st.sampled_from(["train", "test", "", "train", "Validation", "x"])


@pytest.mark.parametrize("kind", READERS)
@given(text=st.text(max_size=200))
def test_any_text_is_read_or_refused(tmp_path_factory, kind, text):
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    path.write_bytes(("case_id,slide_id,y,z\n" + text).encode(errors="surrogatepass"))
    try:
        found = READERS[kind](path)
    except UserError as error:
        assert str(path) in error.problem and error.cure
        return
    assert len(found.slide_ids) == len(found.case_ids) == len(set(found.slide_ids)) > 0


@given(content=st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("labels") / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_labels(path, "y" * 101)


@pytest.mark.parametrize("kind", READERS)
@given(rows=st.lists(st.tuples(CASES, VALUES, VALUES, PARTS), max_size=6), random=st.randoms())
def test_the_order_of_the_rows_does_not_matter(tmp_path_factory, kind, rows, random):
    folder = tmp_path_factory.mktemp("labels")
    rows = [(f"s{i}.svs", *row) for i, row in enumerate(rows)]

    def read(name, lines):
        header = "slide_id\tcase_id\ty\tz\tfold_0"
        return READERS[kind](table(folder, "\r\n".join([header, *map("\t".join, lines)]), name))

    shuffled = list(rows)
    random.shuffle(shuffled)
    try:
        found = vars(read("a.tsv", rows))
    except UserError:
        with pytest.raises(UserError):
            read("b.tsv", shuffled)
        return
    again = vars(read("b.tsv", shuffled))
    for name, value in found.items():
        np.testing.assert_array_equal(value, again[name])
