"""Fitted heads on disk: written by a cross-validation, applied to slides it never saw.

    heads.json   which head, which tasks, what its features were, sha256 of heads.npz
    heads.npz    each parameter of all members, float32, under its path: "embed/kernel"

Members stand fold by fold: member `fold * seeds + seed`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, read_json, write_json
from pathme_jax.mil import population
from pathme_jax.mil.heads import make
from pathme_jax.mil.heads.common import Bag
from pathme_jax.mil.tasks import Task, Tasks
from pathme_jax.records.features import identity_of, read_features
from pathme_jax.training.contract import flat, nested

VERSION = 1  # of the files; raise it when what stands in them changes its meaning
ABOUT, PARAMS = "heads.json", "heads.npz"
KEYS = ("head", "options", "sizes", "tasks", "folds", "seeds", "features", "scales", "sha256")
LEAST = 64  # instances: smaller bags are padded to it


@dataclasses.dataclass(frozen=True)
class Answer:
    """What p members say of one slide of m instances.

    Attributes:
        logits: (p, o). attention: (p, a, m), each row sums to one.
    """

    logits: np.ndarray
    attention: np.ndarray


@dataclasses.dataclass(frozen=True)
class Saved:
    """Fitted heads that take raw features.

    Attributes:
        about: heads.json.
        params: tree of (p, ...) float32.
    """

    head: Any
    tasks: Tasks
    params: Any
    about: dict[str, Any]

    @property
    def folds(self) -> int:
        return self.about["folds"]

    @property
    def seeds(self) -> int:
        return self.about["seeds"]

    @property
    def width(self) -> int:
        """Of the features."""
        return _width(self.params)

    @property
    def features(self) -> dict[str, Any]:
        """Of what it was trained on, see `features_of`."""
        return self.about["features"]

    def answer(self, features: np.ndarray, cells: np.ndarray) -> Answer:
        """All members on one slide.

        Args:
            features: (m, d). cells: (m, 2) row and column, zeros where unknown.

        Raises:
            UserError: features of another width, or none.
        """
        count, width = features.shape
        if width != self.width or not count:
            raise UserError(
                f"{count} features of width {width}: the heads take {self.width}",
                "Extract with the encoder and µm/px that the heads were trained on",
            )
        size = padded(count)
        wide = np.zeros((size, width), np.float32)
        wide[:count] = features
        at = np.zeros((size, 2), np.int32)
        at[:count] = cells
        bag = Bag(jnp.asarray(wide), jnp.arange(size) < count, jnp.asarray(at))
        logits, attention = _members(self.head, self.params, bag)
        return Answer(np.asarray(logits), np.asarray(attention)[..., :count])

    def scores(self, answer: Answer, task: str) -> np.ndarray:
        """(p, c) of each member, see `Task.predict`; numbers in their own unit."""
        which = self._index(task)
        found = np.asarray(
            self.tasks.each[which].predict(self.tasks.logits_of(answer.logits)[which])
        )
        scales = self.about["scales"].get(task, [[1.0, 0.0]] * self.folds)
        factor, shift = np.repeat(np.array(scales), self.seeds, axis=0).T[..., None]
        return found * factor + shift

    def attention(self, answer: Answer, task: str) -> np.ndarray:
        """(m,) mean over the members and a head's rows; of a head with a row a class, of the class a member says."""
        which = self._index(task)
        rows = answer.attention
        if getattr(self.head, "per_class", False):  # a row a logit
            end = sum(each.outputs for each in self.tasks.each[: which + 1])
            rows = rows[:, end - self.tasks.each[which].outputs : end]
            if self.tasks.each[which].kind == "classes":
                said = self.scores(answer, task).argmax(1)
                rows = rows[np.arange(len(rows)), said][:, None]
        return rows.mean((0, 1))

    def predict(
        self, features: np.ndarray, cells: np.ndarray, task: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(c,) scores averaged over the members, (c,) their standard deviation, (m,) attention; see `answer`."""
        answer = self.answer(features, cells)
        scores = self.scores(answer, task)
        return scores.mean(0), scores.std(0), self.attention(answer, task)

    def _index(self, task: str) -> int:
        names = [each.name for each in self.tasks.each]
        if task not in names:
            raise UserError(f"no task {task!r} in these heads", f"They know {', '.join(names)}")
        return names.index(task)


def padded(count: int) -> int:
    """The size a bag is padded to: four sizes between a power of two and the next, less than a quarter more."""
    step = 1 << max(max(count, 1).bit_length() - 3, 0)
    return max(LEAST, -(-count // step) * step)


@functools.partial(jax.jit, static_argnums=0)
def _members(head: Any, params: Any, bag: Bag) -> tuple[jax.Array, jax.Array]:
    """(p, o) logits and (p, a, m) attention, one member after another: a slide may be large."""

    def one(params: Any) -> tuple[jax.Array, jax.Array]:
        out = head.apply({"params": params}, bag)
        return out.logits, out.attention

    return jax.lax.map(one, params)


# ---- files -----------------------------------------------------------------------------------------


def save(
    folder: str | Path,
    fitted: population.Population,
    *,
    head: str,
    options: str,
    sizes: Mapping[str, Any],
    tasks: Tasks,
    folds: int,
    seeds: int,
    features: Mapping[str, Any],
    scales: Mapping[str, Sequence[Sequence[float]]],
) -> None:
    """Writes the first `folds * seeds` members of a population; complete or not at all.

    Args:
        head, options, sizes: what `heads.make` was given.
        features: what the heads were trained on, see `features_of`.
        scales: of a task, for each fold what its predictions are multiplied by, and what is added: of a number the
            deviation and mean that it was standardised by. Tasks that are not in it stay as they are.
    """
    count = folds * seeds
    arrays = {
        path: np.asarray(value, np.float32)[:count]
        for path, value in flat(jax.tree.map(np.asarray, fitted.params)).items()
    }
    short = [path for path, value in arrays.items() if len(value) < count]
    assert not short, f"fewer than {count} members: {short[0]}"
    with atomic(folder) as temporary:
        temporary.mkdir(parents=True)
        np.savez(temporary / PARAMS, **arrays)  # pyright: ignore[reportArgumentType]
        about = {
            "version": VERSION,
            "head": head,
            "options": options,
            "sizes": dict(sizes),
            "tasks": [dataclasses.asdict(task) for task in tasks.each],
            "folds": folds,
            "seeds": seeds,
            "features": dict(features),
            "scales": {name: np.asarray(rows).tolist() for name, rows in scales.items()},
            "sha256": _sha256(temporary / PARAMS),
        }
        write_json(temporary / ABOUT, about)


def load(folder: str | Path) -> Saved:
    """What `save` wrote.

    Raises:
        UserError: a file is missing, damaged, or of another version.
    """
    folder = Path(folder)
    cure = "Cross-validate again with this version of pathme_jax.mil_train"
    for name in (ABOUT, PARAMS):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file, so there are no heads here", cure)
    try:
        about = read_json(folder / ABOUT)
        version = about["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / ABOUT}: damaged ({error!r})", cure) from error
    if version != VERSION:
        raise UserError(f"{folder / ABOUT}: version {version}, expected {VERSION}", cure)
    if missing := [key for key in KEYS if key not in about]:
        raise UserError(f"{folder / ABOUT}: no {', '.join(missing)} in it", cure)
    if _sha256(folder / PARAMS) != about["sha256"]:
        raise UserError(f"{folder / PARAMS}: not the file that {ABOUT} describes (damaged)", cure)
    try:
        with np.load(folder / PARAMS) as file:
            arrays = {path: file[path] for path in file.files}
        tasks = Tasks(tuple(_task(each) for each in about["tasks"]))
        head = make(about["head"], tasks.outputs, about["sizes"], about["options"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder}: these heads cannot be read ({error!r})", cure) from error
    heads = Saved(head, tasks, nested(arrays), about)
    _check_shapes(folder, heads, arrays, cure)
    return heads


def _width(params: Mapping[str, Any]) -> int:
    """Of the features that the first layer takes, see `heads.absorb`."""
    first = "embed" if "embed" in params else "classify"
    return params[first]["kernel"].shape[1]


def _task(content: Mapping[str, Any]) -> Task:
    return Task(**{**content, "names": tuple(content["names"])})


def _check_shapes(folder: Path, heads: Saved, arrays: Mapping[str, np.ndarray], cure: str) -> None:
    """Raises UserError where the head of this version has other parameters."""
    count, bag = heads.folds * heads.seeds, _any_bag(heads.width)
    made = jax.eval_shape(lambda: heads.head.init(jax.random.key(0), bag)["params"])
    expected = {path: (count, *x.shape) for path, x in flat(made).items()}
    found = {path: x.shape for path, x in arrays.items()}
    if found != expected:
        differ = sorted(k for k in found | expected if found.get(k) != expected.get(k))
        raise UserError(
            f"{folder}: {heads.about['head']} has {expected.get(differ[0])} of {differ[0]}, "
            f"{PARAMS} holds {found.get(differ[0])}",
            cure,
        )


def _any_bag(width: int) -> Bag:
    return Bag(jnp.zeros((1, width)), jnp.ones(1, bool), jnp.zeros((1, 2), jnp.int32))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- what heads are trained on ---------------------------------------------------------------------


def features_of(
    folder: str | Path, slide_ids: Sequence[str], parent: str | Path | None = None
) -> dict[str, Any]:
    """What a later slide's features must be like: encoder, µm/px, patch size, width, type, tiling.

    Args:
        folder: of feature files; those of `slide_ids` that are absent are passed over.
        parent: of features at 4 × the µm/px that are joined to each instance.

    Returns:
        encoder, mpp, patch_size, dtype, made_from ([] and None where a foreign file does not say); width, joined
        to the parent's; tokens: whether they are a region encoder's; tiling: recipe.json of the
        grid, None where it is not there; slides and identity of all files; parent: the same of the parent.
    """
    folder = Path(folder)
    paths = [p for p in (folder / f"{slide_id}.h5" for slide_id in slide_ids) if p.exists()]
    if not paths:
        raise UserError(f"{folder}: no feature file of these slides", "Extract them")
    first = read_features(paths[0], dtype=None)
    tiling = folder.resolve().parents[1] / "recipe.json"
    found = {
        "encoder": first.attrs.get("encoder"),
        "mpp": first.attrs.get("mpp"),
        "patch_size": first.attrs.get("patch_size"),
        "width": first.features.shape[1],
        "dtype": str(first.features.dtype),
        "tokens": _has_kind(paths[0]),
        "made_from": json.loads(first.attrs.get("made_from", "[]")),
        "tiling": read_json(tiling) if tiling.is_file() else None,
        "slides": len(paths),
        "identity": digest([identity_of(path) for path in paths]),
        "parent": None,
    }
    if parent:
        found["parent"] = features_of(parent, slide_ids)
        found["width"] += found["parent"]["width"]
    return found


def _has_kind(path: Path) -> bool:
    """Region tokens say of each row what it is; tiles do not."""
    with h5py.File(path, "r") as file:
        return "kind" in file
