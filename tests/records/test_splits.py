"""Split files of other tools become the same fold columns; a leak is refused by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathme_jax.errors import UserError
from pathme_jax.records.splits import read_splits

SLIDES = ["s0", "s1", "s2", "s3", "s4"]
CASES = ["a", "a", "b", "c", "d"]
PARTS = ["train", "train", "val", "test", ""]
FIRST = ",train,val,test\n0,s0,s2,s3\n1,s1,,\n"
SECOND = ",train,val,test\n0,s2,,s0\n1,s3,,s1.svs\n2,s4.0,,\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path):
    with pytest.raises(UserError) as error:
        read_splits(path, SLIDES, CASES)
    assert "\n" not in str(error.value)
    return str(error.value)


ONE_FOLD = {
    "CLAM": ("splits_0.csv", FIRST, "CLAM splits, 1 fold"),
    "CLAM bool": (
        "splits_0_bool.csv",
        ",train,val,test\ns0.pt,True,False,False\ns1,True,False,False\ns2,False,True,False\n"
        "s3,False,False,True\ns4,FALSE,FALSE,FALSE\n",
        "CLAM splits, 1 fold",
    ),
    "Patho-Bench": (
        "k=all.tsv",
        "case_id\tslide_id\ty\tfold_0\na\ts0\t1\ttrain\na\ts1\t1\ttrain\nb\ts2\t0\tval\nc\ts3\t0\ttest\n",
        "Patho-Bench splits, 1 fold",
    ),
    "Patho-Bench cases": (
        "k=all.tsv",
        "case_id\ty\tfold_0\na\t1\ttrain\na\t1\ttrain\nb\t0\tval\nc\t0\ttest\nd\t0\t\n",
        "Patho-Bench splits, 1 fold",
    ),
    "PatHME": (
        "brca_subtype.csv",
        "P_ID,subtype,fold_1\na,0,train\nb,1,val\nc,1,test\n",
        "PatHME or LRMIL splits, 1 fold",
    ),
    "LRMIL": (
        "brca.csv",
        "P_ID,event,fold_1\r\nc,0,test\r\nb,1,val\r\na,1,train\r\n",
        "PatHME or LRMIL splits, 1 fold",
    ),
    "STAMP": (
        "splits.json",
        json.dumps(
            {"splits": [{"train_patients": ["a"], "val_patients": ["b"], "test_patients": ["c"]}]}
        ),
        "JSON splits, 1 fold",
    ),
    "JSON": (
        "mine.json",
        json.dumps({"train": ["s0.h5", "s1"], "validation": ["s2", ""], "test": ["s3"], "seed": 3}),
        "JSON splits, 1 fold",
    ),
}


@pytest.mark.parametrize("tool", ONE_FOLD)
@pytest.mark.parametrize("as_folder", ["file", "folder"])
def test_every_tools_file_is_the_same_fold(tmp_path, tool, as_folder):
    name, text, said = ONE_FOLD[tool]
    path = write(tmp_path / "splits" / name, text)
    folds, notes = read_splits(path if as_folder == "file" else path.parent, SLIDES, CASES)
    assert list(folds.values()) == [PARTS]
    assert notes == [said, "1 labelled slides are in no split: s4"]


def test_a_folder_of_clam_is_one_fold_a_file_in_numeric_order(tmp_path):
    write(tmp_path / "splits_10.csv", FIRST)
    write(tmp_path / "splits_2.csv", SECOND)
    write(tmp_path / "splits_10_bool.csv", ONE_FOLD["CLAM bool"][1])
    write(tmp_path / "splits_2_descriptor.csv", ",train,val,test\npos,2,0,1\n")
    write(tmp_path / "labels.csv", "case_id,slide_id,fold_0\na,s0,test\n")
    folds, notes = read_splits(tmp_path, SLIDES, CASES)
    assert folds == {"splits_2": ["test", "test", "train", "train", "train"], "splits_10": PARTS}
    assert list(folds) == ["splits_2", "splits_10"] and notes == ["CLAM splits, 2 folds"]


def test_lists_and_true_false_that_disagree_are_refused(tmp_path):
    write(tmp_path / "splits_0.csv", FIRST)
    write(
        tmp_path / "splits_0_bool.csv",
        ONE_FOLD["CLAM bool"][1].replace("s2,False,True", "s2,True,False"),
    )
    assert "splits_0: 's2' of patient 'b' is in both val and train" in refusal(tmp_path)


def test_folds_keep_the_names_of_their_columns_and_their_order(tmp_path):
    text = "P_ID,fold_10,fold_2,fold_1\na,train,val,test\nb,,train,train\nc,test,test,train\n"
    folds, _ = read_splits(write(tmp_path / "f.csv", text), SLIDES, CASES)
    assert list(folds) == ["fold_1", "fold_2", "fold_10"]
    assert folds["fold_10"] == ["train", "train", "", "test", ""]
    named = {"folds": {"x": {"train": ["a"], "test": ["b"]}, "y": {"train": ["b"], "test": ["c"]}}}
    folds, notes = read_splits(write(tmp_path / "f.json", json.dumps(named)), SLIDES, CASES)
    assert list(folds) == ["x", "y"] and folds["y"] == ["", "", "train", "test", ""]
    assert "JSON splits, 2 folds" in notes


def test_suffixes_do_not_matter_on_either_side(tmp_path):
    path = write(tmp_path / "splits_0.csv", "train,test\nx.svs,y\n")
    assert read_splits(path, ["x.h5", "y.pt"], ["a", "b"])[0] == {"splits_0": ["train", "test"]}


def test_what_is_missing_on_either_side_is_counted(tmp_path):
    path = write(tmp_path / "splits_0.csv", "train,test\ns0,s2\ns1,s9\nt1.svs,nan\n")
    folds, notes = read_splits(path, SLIDES, CASES)
    assert folds == {"splits_0": ["train", "train", "test", "", ""]}
    assert notes[1:] == [
        "2 ids of the splits have no label: s9, t1.svs",
        "2 labelled slides are in no split: s3, s4",
    ]


def test_numbers_that_name_slides_and_patients_alike_are_taken_for_what_more_of_them_are(tmp_path):
    slides, cases = ["1", "2", "3", "4"], ["1", "1", "2", "2"]
    lists = write(tmp_path / "splits_0.csv", ",train,test\n0,1,3.0\n1,2,4.0\n")
    assert read_splits(lists, slides, cases)[0] == {"splits_0": ["train", "train", "test", "test"]}
    patients = write(tmp_path / "p.csv", "P_ID,fold_0\n1,test\n2,train\n")
    assert read_splits(patients, slides, cases)[0] == {"fold_0": ["test", "test", "train", "train"]}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "splits_0.csv",
            ",train,test\n0,s0,s2\n1,,s0\n",
            ["splits_0: 's0' of patient 'a'", "train and test"],
        ),
        ("splits_0.csv", ",train,test\n0,s0,s2\n1,,s0.svs\n", ["'s0.svs' of patient 'a'"]),
        (
            "splits_0.csv",
            ",train,val,test\n0,s0,s1,s2\n",
            ["splits_0: patient 'a' is in both train and val"],
        ),
        (
            "splits_0.csv",
            ",train,test\n0,s0,x\n1,x.h5,s2\n",
            ["splits_0: 'x", "in both train and test"],
        ),
        (
            "f.csv",
            "slide_id,fold_3\ns0,test\ns1,train\n",
            ["fold_3: patient 'a' is in both test and train"],
        ),
        (
            "f.csv",
            "P_ID,fold_1\na,train\na,val\n",
            ["fold_1: 'a' of patient 'a' is in both train and val"],
        ),
        (
            "f.json",
            '[{"train": ["s0"], "test": ["s1"]}]',
            ["fold_0: patient 'a' is in both train and test"],
        ),
        ("f.csv", "P_ID,fold_1\na,maybe\n", ["fold_1 of slide 'a' is 'maybe'"]),
        ("f.csv", "P_ID,fold_1\nz,train\n", ["none of its 1 ids", "'z'", "'s0'"]),
        ("f.csv", "P_ID,fold_1\n,train\n", ["no fold columns"]),
    ],
)
def test_a_leak_and_strangers_are_refused_by_name(tmp_path, name, text, words):
    said = refusal(write(tmp_path / name, text))
    assert all(word in said for word in [name, *words]), said


def test_one_slide_written_in_two_ways_is_one_slide(tmp_path):
    path = write(tmp_path / "splits_0.csv", ",train,test\n0,12,13\n1,,12.0\n")
    with pytest.raises(UserError, match=r"'12.0' of patient 'p' is in both train and test"):
        read_splits(path, ["12", "13"], ["p", "q"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "x,y\n1,2\n"),
        ("a.csv", ""),
        ("a.csv", "case_id,y\n1,2\n"),
        ("splits_0_descriptor.csv", ",train,val,test\npos,s0,0,s2\n"),
        ("a.json", "{"),
        ("a.json", "[" * 5000),
        ("a.json", '{"train": ["s0"]}'),
        ("a.json", '{"train": ["s0"], "test": "s2"}'),
        ("a.json", '{"train": ["s0"], "test": [["s2"]]}'),
        ("a.json", '[{"train": ["s0"], "test": ["s2"]}, 3]'),
        ("a.json", "3"),
    ],
)
def test_what_is_not_recognised_is_told_what_is(tmp_path, name, text):
    said = refusal(write(tmp_path / name, text))
    assert name in said and "Understood: CLAM" in said and "Patho-Bench" in said and "JSON" in said


def test_folders_that_hold_nothing_or_several_are_refused(tmp_path):
    assert "no.csv" in refusal(tmp_path / "no.csv")
    assert "no split file" in refusal(tmp_path)
    write(tmp_path / "k=1.tsv", ONE_FOLD["Patho-Bench"][1])
    write(tmp_path / "k=2.tsv", ONE_FOLD["Patho-Bench"][1])
    said = refusal(tmp_path)
    assert "k=1.tsv, k=2.tsv" in said and "give one of them" in said
    write(tmp_path / "k=all.tsv", ONE_FOLD["Patho-Bench"][1])
    assert list(read_splits(tmp_path, SLIDES, CASES)[0].values()) == [PARTS]
    write(tmp_path / "splits_0.csv", ONE_FOLD["PatHME"][1])
    assert "splits_0.csv: no columns train and test" in refusal(tmp_path)


ID = st.sampled_from(["s0", "s1.svs", "s2", "s3", "s4", "a", "b", "x", "", "1.0", "True"])


@given(rows=st.lists(st.tuples(ID, ID, ID, ID), max_size=4), random=st.randoms())
def test_any_lists_in_any_order_are_read_alike_or_refused(tmp_path_factory, rows, random):
    folder = tmp_path_factory.mktemp("splits")

    def read(name, lines):
        text = "\n".join(["slide_id,train,val,test", *map(",".join, lines)])
        return read_splits(write(folder / name / "splits_0.csv", text), SLIDES, CASES)

    shuffled = list(rows)
    random.shuffle(shuffled)
    try:
        folds, notes = read("a", rows)
    except UserError:
        with pytest.raises(UserError):
            read("b", shuffled)
        return
    assert (folds, notes) == read("b", shuffled)
    sides = [{p for p, c in zip(folds["splits_0"], CASES, strict=True) if c == k} for k in "abcd"]
    assert all(len(side - {""}) < 2 for side in sides)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ID,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["train", "test_ids", "val", "splits", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(content=JSON)
def test_any_json_is_read_or_refused(tmp_path_factory, content):
    path = write(tmp_path_factory.mktemp("splits") / "a.json", json.dumps(content))
    try:
        folds, _ = read_splits(path, SLIDES, CASES)
    except UserError:
        return
    assert folds and all(len(parts) == len(SLIDES) for parts in folds.values())


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json"])
@pytest.mark.parametrize("start", ["", "train,test\n", "case_id\tfold_0\n", '{"train": ['])
@given(text=st.text(max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory, name, start, text):
    path = tmp_path_factory.mktemp("splits") / name
    path.write_bytes((start + text).encode(errors="replace"))
    try:
        read_splits(path, SLIDES, CASES)
    except UserError as error:
        assert str(path) in error.problem
