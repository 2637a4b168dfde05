"""Slide-level heads by name: a bag of instances in, logits and attention out (`common.Bag`, `common.Out`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from pathme_jax.errors import UserError
from pathme_jax.mil.heads.abmil import ABMIL
from pathme_jax.mil.heads.clam import CLAM_MB, CLAM_SB
from pathme_jax.mil.heads.common import absorb
from pathme_jax.mil.heads.dsmil import DSMIL
from pathme_jax.mil.heads.dtfd import DTFD
from pathme_jax.mil.heads.ilra import ILRA
from pathme_jax.mil.heads.pooling import MaxPool, MeanPool
from pathme_jax.mil.heads.rrt import RRT
from pathme_jax.mil.heads.transformer import Transformer
from pathme_jax.mil.heads.transmil import TransMIL
from pathme_jax.mil.heads.wikg import WiKG

HEADS: dict[str, type] = {
    "mean": MeanPool,
    "max": MaxPool,
    "abmil": ABMIL,
    "clam_sb": CLAM_SB,
    "clam_mb": CLAM_MB,
    "dsmil": DSMIL,
    "transmil": TransMIL,
    "dtfd": DTFD,
    "transformer": Transformer,
    "ilra": ILRA,
    "rrt": RRT,
    "wikg": WiKG,
}

__all__ = ["HEADS", "absorb", "make"]


def make(name: str, outputs: int, sizes: dict[str, Any], options: str = "") -> Any:
    """A head of HEADS.

    Args:
        outputs: number of logits.
        sizes: hidden, attention and dropout, taken where the head has them.
        options: further fields, such as "heads=4,gated=false".

    Raises:
        UserError: an unknown head or field, or a value of the wrong type.
    """
    if name not in HEADS:
        raise UserError(f"--head {name}", f"Expected one of {', '.join(HEADS)}")
    fields = {
        f.name: f for f in dataclasses.fields(HEADS[name]) if f.name not in ("parent", "name")
    }
    given = {key: value for key, value in sizes.items() if key in fields}
    if "embed" in fields and "hidden" in sizes:
        given["embed"] = (sizes["hidden"],)
    for part in filter(None, options.split(",")):
        key, _, text = part.partition("=")
        if key not in fields or key == "outputs":
            known = ", ".join(sorted(set(fields) - {"outputs"}))
            raise UserError(f"--options {part!r}: {name} has no {key!r}", f"It has {known}")
        given[key] = _parsed(part, text, fields[key].default)
    return HEADS[name](outputs, **given)


def _parsed(part: str, text: str, like: Any) -> Any:
    """`text` as a value of the type of `like`; sizes of several layers are joined by x, as 256x128."""
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(like, tuple):
            return tuple(int(size) for size in text.split("x") if size)
        return type(like)(text)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"--options {part!r}: not {type(like).__name__}", f"Its default is {like!r}"
        ) from error
