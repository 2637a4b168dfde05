"""kNN and linear probe of the encoder being trained, on a few labelled tiles kept in memory.

config.probe = dict(
    every=1000,          # steps
    path="OUT/20x-…",    # a tiled folder, best of slides not trained on
    labels="labels.csv", # case_id, slide_id and classes
    column="detail",     # the class to predict; slides where it is blank are left out
    tiles=8,             # of each slide, from as many different fields as it has
    px=256,              # side of a tile as the encoder sees it
    multiple=1,          # of the fields' mpp: 4 takes tiles 4 x as wide and averages 4 x 4 pixels
    split="case",        # or "tile"
    folds=5,
)
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from pathme_jax.encoders.descriptors import mean_rgb
from pathme_jax.errors import UserError
from pathme_jax.files import read_json
from pathme_jax.models.placement import by_sample
from pathme_jax.records import fields
from pathme_jax.records.labels import read_labels
from pathme_jax.training import checkpoints, watch
from pathme_jax.training.contract import Config, Method
from pathme_jax.training.step import Plan, on_host, params_of

BATCH = 64  # images; constant, so that the encoder is compiled once


class Probe:
    """A tile's features against the class of its slide.

    The tiles and the folds depend on the folder and the settings alone, never on the run's seed, so values of
    different steps and runs compare. A tile takes its slide's label, whether or not it shows it.

    With split = "case" no case is on both sides of a fold: what is measured carries over to new patients.
    With split = "tile" only fields are kept apart, and a tile is tested against others of its own slide.
    That works with one slide a class, but an encoder that merely recognises slides (stain, scanner, blur)
    scores as high as one that knows tissue: it compares encoders, it is no measure of accuracy on patients.
    The names of its values say "by_tile".

    Attributes:
        name: "probe/<column>" or "probe/<column>_by_tile", before the name of every value.
        images: (n, px, px, 3) uint8.
        labels, groups: (n,) text: the class, and what no fold splits.
    """

    def __init__(self, settings: Config):
        """Reads and decodes the tiles: tiles x slides x px² x 3 bytes of memory.

        Raises:
            UserError: no such folder or table, none of its slides labelled, or settings that do not fit.
        """
        if settings.split not in ("case", "tile"):
            raise UserError(f"config.probe.split = {settings.split!r}", 'Expected "case" or "tile"')
        table = read_labels(settings.labels, settings.column)
        row_of = {slide: row for row, slide in enumerate(table.slide_ids)}
        known = [slide for slide in fields.tiled_slides(settings.path) if slide in row_of]
        if not known:
            raise UserError(
                f"no slide of {settings.path} has a {settings.column!r} in {settings.labels}",
                "Give the folder and the label table of the same slides",
            )
        source = fields.FieldSource(settings.path, known)
        images, labels, groups = [], [], []
        for slide in source.slide_ids:
            row = row_of[slide]
            for field, image in _tiles(source, slide, settings):
                images.append(image)
                labels.append(table.classes[table.labels[row]])
                groups.append(table.case_ids[row] if settings.split == "case" else str(field))
        self.name = f"probe/{settings.column}" + ("_by_tile" if settings.split == "tile" else "")
        self.images = np.array(images, np.uint8)
        self.labels, self.groups = np.array(labels), np.array(groups)
        self.folds = settings.folds

    def features(self, encode: Callable[[Any, Mapping[str, Any]], Any], product: Any) -> np.ndarray:
        """(n, d) of every tile.

        Args:
            encode: jitted `Method.encode`, to (b, d). Over several processes all call this, and the result
                must be replicated.
            product: its parameters.
        """
        parts = [
            np.asarray(encode(product, {"image": batch}), np.float32)[:count]
            for batch, count in self._batches()
        ]
        return np.concatenate(parts)

    def scores(self, features: np.ndarray) -> dict[str, float]:
        """{"<name>/knn_accuracy", "…/knn_auroc", "…/linear_accuracy", "…/linear_auroc", "…/chance"}.

        Raises:
            UserError: features that are not finite; too few cases of a class (`evaluation.probes.probe`).
        """
        return self._values(self.name, features)

    def baselines(self) -> dict[str, float]:
        """The same, as "<name>/mean_rgb/…", of mean colour: what a useful encoder must beat."""
        features = [
            np.asarray(mean_rgb(jnp.asarray(batch)))[:count] for batch, count in self._batches()
        ]
        return self._values(f"{self.name}/mean_rgb", np.concatenate(features))

    def _batches(self) -> Iterator[tuple[np.ndarray, int]]:
        """Batches of one shape, the last padded with zeros, and how many of each count."""
        for start in range(0, len(self.images), BATCH):
            part = self.images[start : start + BATCH]
            yield np.pad(part, [(0, BATCH - len(part)), (0, 0), (0, 0), (0, 0)]), len(part)

    def _values(self, name: str, features: np.ndarray) -> dict[str, float]:
        from pathme_jax.evaluation import probes  # slow to import

        found = probes.probe(features, self.labels, self.groups, seed=0, folds=self.folds)
        return {f"{name}/{key.replace('/', '_')}": value for key, value in found.items()}


def _tiles(source: fields.Source, slide: str, settings: Config) -> Iterator[tuple[int, np.ndarray]]:
    """(field, image) of a slide's tiles, as evenly over a random choice of its fields as they allow."""
    rng = np.random.default_rng(zlib.crc32(slide.encode()))
    choice = rng.permutation(source.ranges[slide])
    each, left = -(-settings.tiles // len(choice)), settings.tiles
    for field in choice.tolist():
        record = source[field]
        image = fields.decode(record["image"])
        side = settings.px * settings.multiple
        if side > image.shape[0]:
            raise UserError(
                f"tiles of {settings.px} x {settings.multiple} px, fields of {image.shape[0]} px",
                "Lower config.probe.px or config.probe.multiple",
            )
        windows = rng.permutation(_tissue_windows(record["tissue"], image.shape[0], side))
        for y, x in windows[: min(each, left)]:
            yield field, fields.area_average(image[y : y + side, x : x + side], settings.multiple)
            left -= 1
        if not left:
            return


def _tissue_windows(tissue: np.ndarray, field: int, side: int) -> np.ndarray:
    """(m, 2) corners y, x of the windows of `side` px, side by side in a field, at least half tissue.

    tissue: (s, s) bool, the field's cells of field / s px.
    """
    cell = field // len(tissue)
    is_tissue = np.kron(np.asarray(tissue, np.float32), np.ones((cell, cell), np.float32))
    count = field // side
    blocks = is_tissue[: count * side, : count * side].reshape(count, side, count, side)
    return np.argwhere(blocks.mean((1, 3)) >= 0.5) * side


class Probing:
    """kNN and linear probes of the product, logged, and the best step's product kept in <workdir>/best.

    A line of step n tells of the state after that step's update; the one of step -1 of random weights,
    with mean colour beside it. Every process computes features; process 0 judges and decides.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        plan: Plan,
        workdir: Path,
        what: dict[str, Any],
        log: watch.Log,
    ):
        self.probe, self.method, self.mesh = Probe(config.probe), method, plan.mesh
        self.workdir, self.what, self.log = workdir / "best", what, log

        def encode(product: Any, batch: Any) -> Any:
            with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):
                return method.encode(product, {k: by_sample(x) for k, x in batch.items()})

        self.encode = jax.jit(encode, out_shardings=NamedSharding(plan.mesh, PartitionSpec()))

    def __call__(self, state: Any, done: int) -> None:
        product = self.method.product(params_of(state))
        features = self.probe.features(self.encode, product)
        values, better = {}, False
        if jax.process_index() == 0:
            values = self.probe.scores(features)
            more = self.probe.baselines() if done == 0 else {}
            self.log.write(done - 1, {**values, **more}, {})
            better = done > 0 and values[f"{self.probe.name}/linear_auroc"] > self._best()
        if jax.process_count() > 1:
            better = bool(multihost_utils.broadcast_one_to_all(np.array(better)))
        if better:
            product = on_host(product, self.mesh)
            if jax.process_index() == 0:
                checkpoints.write_product(
                    self.workdir,
                    f"{self.workdir.parent.name}-best",
                    product,
                    step=done,
                    identity=self.what,
                    score=values[f"{self.probe.name}/linear_auroc"],
                )

    def _best(self) -> float:
        path = self.workdir / "product.json"
        return read_json(path)["score"] if path.exists() else -1.0
