"""Bags: parents joined by grid, padding that wastes little, and files that cannot be used."""

import h5py
import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.mil.bags import load, make_bags, with_parents
from pathme_jax.mil.outcomes import Classes
from pathme_jax.mil.table import Table
from pathme_jax.mil.tasks import Task
from pathme_jax.records.features import PROMPT, SPATIAL, Bag, coordinate_attrs, write_features


def bag(grid, features, mpp=0.5, kind=None):
    grid = np.array(grid, np.int32).reshape(-1, 2)
    kind = np.full(len(grid), SPATIAL, np.uint8) if kind is None else np.array(kind, np.uint8)
    return Bag("s", np.array(features, np.float32), grid[:, ::-1] * 256, grid, kind, {"mpp": mpp})


def write(folder, slide_id, m=3, d=4, mpp=0.5, value=0.0):
    grid = np.stack([np.arange(m), np.arange(m)], 1)
    attrs = coordinate_attrs(slide_id=slide_id, mpp=mpp, slide_mpp=0.5, level0_size=(4096, 4096))
    write_features(
        folder / f"{slide_id}.h5",
        features=np.full((m, d), value, np.float32),
        coords=grid * 256,
        grid=grid,
        attrs=attrs | {"encoder": "fake", "recipe": "12345678"},
    )


def labels(slides, cases=None, values=None):
    n = len(slides)
    y = np.array(values if values else [i % 2 for i in range(n)], float)
    outcome = Classes(Task("y", "classes", ("0", "1")))
    return Table(slides, cases or slides, [outcome], [y[:, None]], {}, [], [])


def test_an_instance_gets_the_parent_it_lies_in():
    child = bag([[0, 0], [3, 3], [4, 0], [0, 9]], [[1], [2], [3], [4]])
    parent = bag([[0, 0], [1, 0]], [[10], [20]], mpp=2.0)
    joined = with_parents(child, parent)
    assert joined.features.tolist() == [[1, 10], [2, 10], [3, 20]]
    assert joined.grid is not None and joined.grid.tolist() == [[0, 0], [3, 3], [4, 0]]


def test_prompt_tokens_are_no_parents_and_no_children():
    child = bag([[0, 0], [0, 0]], [[1], [2]], kind=[SPATIAL, PROMPT])
    parent = bag([[0, 0], [0, 0]], [[10], [20]], mpp=2.0, kind=[SPATIAL, PROMPT])
    assert with_parents(child, parent).features.tolist() == [[1, 10]]


def test_parents_of_another_magnification_are_refused():
    with pytest.raises(UserError, match=r"parents at 8.0 µm/px, expected 2.0"):
        with_parents(bag([[0, 0]], [[1]]), bag([[0, 0]], [[1]], mpp=8.0))
    foreign = bag([[0, 0]], [[1]])
    foreign.grid = None
    with pytest.raises(UserError, match="without `grid`"):
        with_parents(foreign, bag([[0, 0]], [[1]], mpp=2.0))


def test_one_bad_slide_is_listed_and_the_others_go_on(tmp_path):
    for slide in ("good", "empty", "nan"):
        write(tmp_path, slide, m=0 if slide == "empty" else 3)
    with h5py.File(tmp_path / "nan.h5", "r+") as file:
        file["features"][0, 0] = np.nan
    (tmp_path / "broken.h5").write_text("no")
    found = load(tmp_path, labels(["good", "empty", "nan", "broken", "absent"]))
    assert [slide.slide_id for slide in found.slides] == ["good"]
    reasons = {problem["slide_id"]: problem["reason"] for problem in found.problems}
    assert "no instances" in reasons["empty"]
    assert "NaN" in reasons["nan"]
    assert "not a feature file" in reasons["broken"]
    assert "no features" in reasons["absent"]
    assert all(problem["cure"] for problem in found.problems)


def test_orphans_are_counted_and_a_slide_of_orphans_dropped(tmp_path):
    for slide in "ab":
        write(tmp_path / "fine", slide, m=8)
    write(tmp_path / "coarse", "a", m=1, mpp=2.0)  # covers cells 0 to 3
    found = load(tmp_path / "fine", labels(["a", "b"]), tmp_path / "coarse")
    assert [slide.slide_id for slide in found.slides] == ["a"]
    assert found.orphans == 4 and found.slides[0].features.shape == (4, 8)
    assert found.problems[0]["slide_id"] == "b"


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="no feature files"):
        load(tmp_path, labels(["a"]))
    write(tmp_path, "a", d=4)
    write(tmp_path, "b", d=6)
    with pytest.raises(UserError, match="of a are 4 wide, those of b 6"):
        load(tmp_path, labels(["a", "b"]))
    with pytest.raises(UserError, match="none of the 1 labelled slides"):
        load(tmp_path, labels(["other"]))


def test_a_case_bag_pools_its_slides(tmp_path):
    for i, slide in enumerate("abc"):
        write(tmp_path, slide, m=2 + i, value=i)
    table = labels(list("abc"), ["p", "q", "p"], [0, 1, 0])
    slides = load(tmp_path, table).slides
    assert [len(each.features) for each in make_bags(slides, table, "slide")] == [2, 3, 4]
    pooled = make_bags(slides, table, "case")
    assert [(each.case_id, each.row, each.slide_id) for each in pooled] == [
        ("p", 0, "a;c"),
        ("q", 1, "b"),
    ]
    assert np.asarray(pooled[0].features)[:, 0].tolist() == [0, 0, 2, 2, 2, 2]
