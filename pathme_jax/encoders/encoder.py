"""Encoders by name, by the folder that `convert` or `export` wrote, or by the work folder of a training run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pathme_jax.encoders import descriptors, patch, zoo
from pathme_jax.encoders.zoo import Definition, Input
from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, provenance, read_json, write_json
from pathme_jax.training.checkpoints import fingerprint, load_product
from pathme_jax.training.contract import flat, nested

FIXED: dict[str, Callable] = {
    "hed_texture": descriptors.hed_texture,
    "mean_rgb": descriptors.mean_rgb,
}
ABOUT, PARAMS = "encoder.json", "params.safetensors"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen encoder; for images, `encoder(images)` is all there is to it.

    Attributes:
        name: a fixed encoder's name, or `<name>-<hash8>`: other weights, other name.
        record: "fields" (images) or "regions".
        columns: for regions, the feature columns it was trained on.
        params: on the host.
        apply: (params, batch) to features; pure, to be compiled by whoever calls it. A batch of images is
            {"image": (b, h, w, 3) uint8}, its features (b, width); for regions see `Method.encode`.
        definition: of a public encoder or a ViT trained here, where it can be told as one; else None.
        made_from: the encoders whose weights or features it was trained with, {"name", "licence",
            "terms", "source", "sha256"}, its own weights' publisher first.
        about: what its folder says of it.
        dtype: of the computation.
    """

    name: str
    record: str
    columns: Mapping[str, str]
    params: Any
    apply: Callable[[Any, Mapping[str, Any]], Any]
    definition: Definition | None = None
    made_from: Sequence[Mapping[str, Any]] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """`made_from` and this encoder itself: what anything made with it was made from."""
        own = {"name": self.name, "sha256": self.about.get("sha256", "")}
        if self.definition is not None:
            own |= {k: getattr(self.definition, k) for k in ("licence", "terms", "source")}
        return [*map(dict, self.made_from), own]

    @functools.cached_property
    def _on_device(self) -> Callable[[Mapping[str, Any]], Any]:
        params, apply = jax.device_put(self.params), jax.jit(self.apply)
        return lambda batch: apply(params, batch)

    def encode(self, batch: Mapping[str, Any]) -> Any:
        """`apply` with these parameters on the default device, compiled once a shape."""
        return self._on_device(batch)

    def __call__(self, images: Any) -> Any:
        """Features (b, width) of images (b, h, w, 3) uint8."""
        return self.encode({"image": images})


def load(name: str | Path, dtype: str | None = None) -> Encoder:
    """An encoder ready to use.

    Args:
        name: hed_texture or mean_rgb; or a folder: that of `convert` or `export`, or a finished run's
            --workdir (or its `best`).
        dtype: of the computation, "float32" or "bfloat16"; None keeps what it was trained or made with.

    Raises:
        UserError: none of these, or a damaged one.
    """
    if str(name) in FIXED:
        function = FIXED[str(name)]
        return Encoder(str(name), "fields", {}, {}, lambda _, batch: function(batch["image"]))
    folder = Path(name)
    if (folder / ABOUT).exists():
        return _converted(folder, dtype or "float32")
    if folder.is_dir():
        return _trained(folder, dtype)
    if str(name) in zoo.ENCODERS:
        raise UserError(
            f"{name} is known, its weights are not here",
            f"Get them from {zoo.find(str(name)).source}, then: python -m pathme_jax.convert --encoder"
            f" {name} --weights FILE --out DIR, and give DIR",
        )
    raise UserError(
        f"no encoder {str(name)!r}",
        f"Give one of {sorted(FIXED)}, a folder made by pathme_jax.convert, or the --workdir of a"
        " finished training run",
    )


def save(
    folder: str | Path,
    definition: Definition,
    params: patch.Params,
    *,
    made_from: Sequence[Mapping[str, Any]],
    **more: Any,
) -> str:
    """Writes the folder that `load` reads; complete or not at all. Returns the encoder's name.

    more: further entries of encoder.json, such as metrics.
    """
    from safetensors.numpy import save_file

    arrays = {path: np.asarray(x, np.float32) for path, x in flat(dict(params)).items()}
    sha = fingerprint(nested(arrays))
    name = named(definition, sha)
    with atomic(folder) as temporary:
        temporary.mkdir(parents=True)
        save_file(arrays, temporary / PARAMS)
        (temporary / PARAMS).chmod(0o644)  # it makes files for their owner alone
        about = {
            **more,
            "name": name,
            "sha256": sha,
            "definition": dataclasses.asdict(definition),
            "made_from": list(made_from),
            "provenance": provenance(),
        }
        write_json(temporary / ABOUT, about)
    return name


def named(definition: Definition, sha256: str) -> str:
    """`<name>-<hash8>`: the hash covers the weights and all of the definition that decides features."""
    whole = dataclasses.asdict(definition)
    decides = {k: whole[k] for k in ("model", "input", "output", "pooler")}
    return f"{definition.name}-{digest([sha256, decides])}"


def read_definition(content: Mapping[str, Any]) -> Definition:
    """The definition in an encoder.json."""

    def as_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    how, plain = as_tuples(content["input"]), as_tuples(content)
    return Definition(**{**plain, "input": Input(**how)})


def _converted(folder: Path, dtype: str) -> Encoder:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        about = read_json(folder / ABOUT)
        definition = read_definition(about["definition"])
        params = nested(load_file(folder / PARAMS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: not an encoder ({type(error).__name__}: {error})",
            "Convert or export it again",
        ) from error
    if fingerprint(params) != about["sha256"]:
        raise UserError(
            f"{folder / PARAMS}: not the parameters that {ABOUT} describes",
            "Convert or export it again",
        )

    def apply(params: Any, batch: Mapping[str, Any]) -> Any:
        return patch.encode(definition, params, batch["image"], dtype)

    # Anew, since a definition may have been edited: other features, other name.
    name = named(definition, about["sha256"])
    return Encoder(name, "fields", {}, params, apply, definition, about["made_from"], about, dtype)


def _trained(workdir: Path, dtype: str | None) -> Encoder:
    name, method, params, about = load_product(workdir, dtype)
    spec = method.batch_spec
    define = getattr(method, "definition", None)
    definition = define() if define else None
    if definition is not None:
        own = dataclasses.replace(definition, name=name.rpartition("-")[0])
        name = named(own, about["sha256"])
    computed = dtype or about["config"].get("model", {}).get("dtype", "float32")
    return Encoder(
        name,
        spec.record,
        spec.columns,
        params,
        method.encode,
        definition,
        about.get("made_from", ()),
        about,
        computed,
    )
