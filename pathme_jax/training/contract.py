"""What a training method is. A method is one file; the trainer knows nothing else about it.

A method may live outside the package: a config names it as "module:Class", and a checkpoint holds the
config, so that `extract` finds it again.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from flax import traverse_util

from pathme_jax.errors import UserError

Array = jax.Array
Config = Any  # an ml_collections.ConfigDict: its attributes are known at run time only
Params = dict[str, Any]  # {"student": …, "teacher": …, …}: plain nested dicts of arrays
Batch = Mapping[str, Array]
Metrics = dict[str, Array]

TRAINED = "trained"
FROZEN = "frozen"


@dataclasses.dataclass(frozen=True)
class EmaOf:
    """Moves as m * self + (1 - m) * source, after every update, in fp32.

    Attributes:
        source: path of the parameter to follow; `\\1` refers to the rule's groups.
        momentum: step (int array) to m.
    """

    source: str
    momentum: Callable[[Array], Array]


Role = str | EmaOf
Rules = list[tuple[str, Any]]  # (regular expression of a whole path, value); the first match counts


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """What the data pipeline must deliver.

    Attributes:
        record: "fields" (images) or "regions" (grids of features).
        samples: samples a step, over all devices.
        window_px, mpps, windows_per_field: for fields: side of a window, the µm/px it is drawn at, how
            many windows are cut from one decoded field.
        columns: for regions: alias to column name; an alias "experts/…" gets standardised features.
    """

    record: str
    samples: int
    window_px: int = 256
    mpps: tuple[float, ...] = (0.5,)
    windows_per_field: int = 4
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Method(Protocol):
    """Built from the config alone: `Method(config)`.

    It may also have `pictures(views) -> {kind: (b, h, w, 3) in [0, 1]}`: then a run begins with
    <workdir>/views.png, a few samples as the model sees them. For regions, `inputs(product) -> {column or
    mask: shape and type of one sample}` says what `encode` reads: then `export` can write StableHLO.
    """

    batch_spec: BatchSpec

    def init(self, key: Array, shapes: Mapping[str, Any]) -> tuple[Params, dict[str, Array]]:
        """Parameters, and the auxiliary state no gradient reaches (centres, queues).

        shapes: the batch's arrays as `jax.ShapeDtypeStruct`.
        """
        ...

    @property
    def roles(self) -> Rules:
        """(path, TRAINED | EmaOf | FROZEN), covering every parameter."""
        ...

    def views(self, batch: Batch, keys: Array) -> Any:
        """On the device: crops, masks, augmentation. keys: (samples,), one a sample."""
        ...

    def loss(
        self, params: Params, aux: dict[str, Array], views: Any, keys: Array, step: Array
    ) -> tuple[Array, tuple[Metrics, dict[str, Array]]]:
        """The scalar to minimise, metrics to log and the next auxiliary state."""
        ...

    def product(self, params: Params) -> Params:
        """What `extract` and `export` use, for example the EMA teacher's encoder."""
        ...

    def encode(self, product: Params, batch: Batch) -> Any:
        """Features of a batch without augmentation.

        For "fields": {"image": (b, h, w, 3) uint8} to (b, d). For "regions": {columns, masks} to
        {"features": (b, t, d), "valid": (b, t) bool, "kind": (t,), "cell": (t, 2)} where cell is the
        row and column of the 5x tile a token stands for.
        """
        ...


def load_method(config: Config) -> Method:
    """Builds the method a config names as "module:Class"."""
    module, _, name = str(config.method).partition(":")
    try:
        return getattr(importlib.import_module(module), name)(config)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"config.method = {config.method!r} cannot be loaded ({error})",
            'Expected "module:Class", importable from here',
        ) from error


def flat(params: Params) -> dict[str, Any]:
    """{"student": {"a": x}} to {"student/a": x}."""
    return dict(traverse_util.flatten_dict(params, sep="/"))


def nested(params: Mapping[str, Any]) -> Params:
    return traverse_util.unflatten_dict(dict(params), sep="/")


def resolve(rules: Rules, paths: list[str], what: str) -> dict[str, tuple[Any, re.Match[str]]]:
    """The first rule that matches each path wholly.

    Raises:
        UserError: a path no rule covers.
    """
    found: dict[str, tuple[Any, re.Match[str]]] = {}
    for path in paths:
        for pattern, value in rules:
            match = re.fullmatch(pattern, path)
            if match:
                found[path] = (value, match)
                break
        else:
            raise UserError(
                f"no {what} rule covers the parameter {path}",
                f"Add one; there are {[pattern for pattern, _ in rules]}",
            )
    return found
