"""What a MIL run can be told: the recipe, and the flags of `python -m pathme_jax.mil_train`."""

from __future__ import annotations

import dataclasses
from typing import Any


def _setting(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int = _setting(0, "of folds, initial weights, dropout and bootstrap")
    folds: int = _setting(5, "cross-validation folds; fewer if the smallest class has fewer cases")
    fold_column_prefix: str = _setting("fold_", "the user's fold columns in the labels; '' ignores")
    bag: str = _setting("slide", "slide: one bag a slide, scores averaged per case; case: pooled")
    time_bins: int = _setting(4, "of nll tasks: quantiles of a fold's training events")
    head: str = _setting("abmil", "abmil, clam_sb, dsmil, transmil, … (see mil/heads)")
    options: str = _setting("", "of the head, such as heads=4,gated=false")
    seeds: int = _setting(1, "heads a fold, of other first weights, whose scores are averaged")
    epochs: int = _setting(60, "passes over the training bags")
    patience: int = _setting(
        0, "epochs without a better validation loss before a head rests; 0: all"
    )
    batch: int = _setting(4, "bags per step")
    learning_rate: float = _setting(1e-3, "peak, with cosine decay to zero")
    weight_decay: float = _setting(1e-2, "of AdamW")
    sweep: str = _setting(
        "",
        "rates and decays of which every fold takes the best by its validation loss, "
        "as learning_rate=1e-4:1e-3,weight_decay=0:1e-2",
    )
    hidden: int = _setting(64, "width of the instance embedding")
    attention: int = _setting(32, "width of the attention branches")
    dropout: float = _setting(0.25, "of the embedding, in training")
    max_instances: int = _setting(4096, "per bag in training, 0 for all; prediction uses all")
    bag_devices: int = _setting(1, "devices that share the instances of a bag too large for one")
    host_gb: float = _setting(
        0.0, "of features kept in memory, 0 for 40 %%; more is read when needed"
    )
    device_gb: float = _setting(0.0, "of bags kept on a device, 0 for 40 %%; more is streamed")
    shuffles: int = _setting(1, "controls trained on the truth of other patients")
