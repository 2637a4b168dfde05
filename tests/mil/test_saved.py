"""Saved heads: what comes back is what was written, padding changes nothing, and damage is told."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.mil import population, saved
from pathme_jax.mil.buckets import pack
from pathme_jax.mil.heads import make
from pathme_jax.mil.heads.common import Bag
from pathme_jax.mil.tasks import Task, Tasks
from pathme_jax.records.features import coordinate_attrs, write_features

SIZES = {"hidden": 16, "attention": 8, "dropout": 0.25}
OPTIONS = {"transmil": "heads=2,landmarks=8,pinv_iterations=2"}  # compiled sooner
LABEL = Task("y", "classes", ("a", "b", "c"))
D, FOLDS, SEEDS = 6, 2, 2


def random_population(head, tasks, members, seed=0):
    """Of trained heads it has the form: a leading axis of members, biases that are not zero."""
    module = make(head, tasks.outputs, SIZES, OPTIONS.get(head, ""))
    rng = np.random.default_rng(seed)
    bag = Bag(*map(jax.numpy.asarray, (np.zeros((1, D)), np.ones(1, bool), np.zeros((1, 2), int))))
    one = module.init(jax.random.key(0), bag)["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, (members, *x.shape)).astype(np.float32), one)
    none = np.zeros((members, 0))
    return population.Population(module, tasks, params, none, none, none)


def store(folder, fitted, head="abmil", scales=None, **more):
    facts = {"encoder": "mean_rgb", "width": D, "parent": None}
    options = OPTIONS.get(head, "")
    how = dict(
        head=head, options=options, sizes=SIZES, tasks=fitted.tasks, folds=FOLDS, seeds=SEEDS
    )
    saved.save(folder, fitted, **how, features=facts | more, scales=scales or {})
    return folder


def slide(m, seed=1):
    rng = np.random.default_rng(seed)
    cells = np.stack([np.arange(m) // 9, np.arange(m) % 9], 1).astype(np.int32)
    return rng.normal(size=(m, D)).astype(np.float32), cells


@pytest.mark.parametrize("head", ["abmil", "clam_mb", "transmil"])
def test_saved_heads_say_what_the_population_says(tmp_path, head):
    """Every member of every fold in its place, though the population goes on with those of controls."""
    tasks = Tasks((LABEL,))
    fitted = random_population(head, tasks, FOLDS * SEEDS + 3)
    heads = saved.load(store(tmp_path / "heads", fitted, head))
    x, cells = slide(75)
    members = np.arange(FOLDS * SEEDS)
    pairs = np.stack([members, 0 * members], 1)
    logits, attention = population.predict(fitted, pack([x], [cells]), pairs)
    answer = heads.answer(x, cells)
    np.testing.assert_allclose(answer.logits, logits, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(answer.attention, attention, atol=1e-6)
    mean, spread, weights = heads.predict(x, cells, "y")
    each = LABEL.predict(logits)
    np.testing.assert_allclose(mean, each.mean(0), atol=1e-6)
    np.testing.assert_allclose(spread, each.std(0), atol=1e-6)
    rows = [
        a[i.argmax()] if len(a) == 3 else a.mean(0) for a, i in zip(attention, each, strict=True)
    ]
    np.testing.assert_allclose(weights, np.mean(rows, 0), atol=1e-6)
    assert spread.min() > 1e-3 and weights.shape == (75,) and abs(weights.sum() - 1) < 1e-5


@pytest.mark.parametrize("head", ["abmil", "clam_mb", "transmil"])
def test_padding_changes_nothing(tmp_path, head, monkeypatch):
    heads = saved.load(store(tmp_path, random_population(head, Tasks((LABEL,)), 4), head))
    x, cells = slide(70)
    plain = heads.predict(x, cells, "y")
    monkeypatch.setattr(saved, "padded", lambda count: 3 * count)
    for one, other in zip(plain, heads.predict(x, cells, "y"), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_few_sizes_serve_all_bags():
    counts = np.arange(1, 20_000)
    sizes = np.array([saved.padded(int(n)) for n in counts])
    assert (sizes >= counts).all() and (sizes[64:] < 1.25 * counts[64:]).all()
    assert len(set(sizes.tolist())) < 40


def test_several_tasks_share_a_head_and_numbers_come_in_their_unit(tmp_path):
    tasks = Tasks((LABEL, Task("hrd", "number"), Task("er+pr", "labels", ("er", "pr"))))
    fitted = random_population("clam_mb", tasks, 4)
    scales = {"hrd": [[2.0, 10.0], [4.0, 20.0]]}  # of each fold: times, plus
    heads = saved.load(store(tmp_path, fitted, "clam_mb", scales))
    x, cells = slide(66)
    answer = heads.answer(x, cells)
    raw = answer.logits[:, 3]
    expected = [10 + 2 * raw[0], 10 + 2 * raw[1], 20 + 4 * raw[2], 20 + 4 * raw[3]]
    np.testing.assert_allclose(heads.scores(answer, "hrd")[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(heads.attention(answer, "hrd"), answer.attention[:, 3].mean(0))
    np.testing.assert_allclose(
        heads.attention(answer, "er+pr"), answer.attention[:, 4:].mean((0, 1))
    )
    labels = heads.scores(answer, "er+pr")
    np.testing.assert_allclose(labels, 1 / (1 + np.exp(-answer.logits[:, 4:])), rtol=1e-5)
    with pytest.raises(UserError, match=r"no task 'other'.*y, hrd"):
        heads.predict(x, cells, "other")
    with pytest.raises(UserError, match="width 5: the heads take 6"):
        heads.answer(x[:, :5], cells)
    with pytest.raises(UserError, match="0 features"):
        heads.answer(x[:0], cells[:0])


def test_what_is_missing_damaged_or_of_another_version_is_told(tmp_path):
    folder = store(tmp_path / "heads", random_population("abmil", Tasks((LABEL,)), 4))
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(whole) == {"heads.json", "heads.npz"}

    def refused(words, **files):
        for name, content in {
            **whole,
            **{k.replace("_", "."): v for k, v in files.items()},
        }.items():
            (folder / name).unlink(missing_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=words) as error:
            saved.load(folder)
        assert "\n" not in str(error.value)

    about = json.loads(whole["heads.json"])

    def changed(**more):
        return json.dumps(about | more).encode()

    refused("heads.npz: no such file", heads_npz=None)
    refused("heads.json: no such file", heads_json=None)
    refused("heads.npz: not the file", heads_npz=whole["heads.npz"][:-100])
    bad = bytearray(whole["heads.npz"])
    bad[len(bad) // 2] ^= 1
    refused("heads.npz: not the file", heads_npz=bytes(bad))
    refused("heads.json: damaged", heads_json=whole["heads.json"][:50])
    refused("version 0, expected 1", heads_json=changed(version=0))
    refused("no tasks, seeds in it", heads_json=json.dumps(
        {k: v for k, v in about.items() if k not in ("tasks", "seeds")}
    ).encode())  # fmt: skip
    refused(
        "abmil has .* of classify/kernel, heads.npz holds",
        heads_json=changed(sizes=SIZES | {"hidden": 32}),
    )
    refused("abmil has", heads_json=changed(seeds=3))


def test_what_the_features_were_is_kept(tmp_path):
    """Encoder, µm/px, patch, width with the parent's; the tiling of the grid they lie in; their identity."""
    grid = tmp_path / "20x-1"

    def write(name, mpp, d, recipe):
        folder = grid / f"{name}_256px_0px_overlap" / "features_mean_rgb"
        attrs = coordinate_attrs(slide_id="s", mpp=mpp, slide_mpp=0.25, level0_size=(9000, 9000))
        x, cells = np.ones((4, d), np.float16), np.zeros((4, 2), int)
        attrs |= {"encoder": "mean_rgb", "recipe": recipe, "made_from": '[{"name": "mean_rgb"}]'}
        path = folder / "s.h5"
        write_features(path, features=x, coords=cells, grid=cells, attrs=attrs)
        return folder

    fine, coarse = write("20x", 0.5, 3, "r1"), write("5x", 2.0, 4, "r2")
    assert saved.features_of(fine, ["s"])["tiling"] is None
    (grid / "recipe.json").write_text('{"mpp": 0.5}')
    found = saved.features_of(fine, ["s", "absent"], coarse)
    assert (found["encoder"], found["mpp"], found["patch_size"]) == ("mean_rgb", 0.5, 256)
    assert (found["width"], found["dtype"], found["slides"]) == (7, "float16", 1)
    assert found["tiling"] == {"mpp": 0.5} and found["parent"]["mpp"] == 2.0
    assert found["made_from"] == [{"name": "mean_rgb"}] and not found["tokens"]
    write("20x", 0.5, 3, "r3")
    assert saved.features_of(fine, ["s"])["identity"] != found["identity"]
    with pytest.raises(UserError, match="no feature file"):
        saved.features_of(fine, ["absent"])
