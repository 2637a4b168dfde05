"""What torchmil's ABMIL, CLAM and DSMIL answer, for tests/mil/heads. Needs torch and torchmil 1.0.2.

    python tests/references/make_mil_a.py        # writes mil_a.json beside itself

Parameters and the bag are drawn from their names, so that the answers alone are stored. Where torchmil
departs from the paper it is given the paper's part: CLAM's instance loss is torch's cross-entropy or the
smooth top-1 SVM (torchmil's own is summed over the wrong axis, targets being (n, 1)), and DSMIL's values are
linear instead of the instances themselves.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.mil.heads.common import Bag

STORED = Path(__file__).with_name("mil_a.json")
INSTANCES, WIDTH, EMBED, ATTENTION = 40, 12, 10, 6
COMMON: dict[str, Any] = dict(embed=(EMBED,), attention=ATTENTION)
ABMIL: dict[str, Any] = {
    "abmil": dict(**COMMON, outputs=1, gated=False),
    "abmil_gated": dict(**COMMON, outputs=1),
}
# torchmil always takes both of the two classes into the instance loss, which is our `subtyping`
CLAM: dict[str, Any] = {
    "clam_sb_ce": dict(**COMMON, outputs=2, subtyping=True, instance_loss="ce"),
    "clam_sb_svm": dict(**COMMON, outputs=2, subtyping=True),
}
DSMIL: dict[str, Any] = {"dsmil": dict(**COMMON, outputs=1)}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values from the name alone: columns of matrices of length one or so, biases of order 0.3."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scale = 1.5 / np.sqrt(shape[0]) if len(shape) > 1 else 0.3
    return (scale * rng.normal(size=shape)).astype(np.float32)


def bag() -> Bag:
    features = draw("features", (WIDTH, INSTANCES)).T * np.float32(WIDTH**0.5)
    return Bag(
        jnp.asarray(features), jnp.ones(INSTANCES, bool), jnp.zeros((INSTANCES, 2), jnp.int32)
    )


def parameters(head: Any) -> Any:
    """The head's parameters, each drawn from its path."""
    shapes = jax.eval_shape(head.init, jax.random.key(0), bag())["params"]
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(draw(jax.tree_util.keystr(path), leaf.shape)), shapes
    )


def answers(case: str) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in json.loads(STORED.read_text())[case].items()}


# ---- torchmil --------------------------------------------------------------------------------------------


def linear(params: Any, name: str, rows: slice = slice(None)) -> Any:
    """torch's layer of our Dense `name`, of some of its outputs."""
    import torch

    kernel = np.array(params[name]["kernel"]).T[rows]
    layer = torch.nn.Linear(kernel.shape[1], kernel.shape[0], bias="bias" in params[name])
    layer.weight.data = torch.from_numpy(kernel.copy())
    if layer.bias is not None:
        layer.bias.data = torch.from_numpy(np.array(params[name]["bias"])[rows])
    return layer


def put_attention(pool: Any, params: Any, gated: bool) -> None:
    pool.fc1, pool.fc2 = linear(params, "tanh"), linear(params, "attend")
    if gated:
        pool.fc_gated = linear(params, "gate")


def abmil(fields: dict[str, Any], params: Any, x: Any, embed: Any) -> dict[str, Any]:
    from torchmil.models import ABMIL as Theirs

    gated = fields.get("gated", True)
    model = Theirs((WIDTH,), ATTENTION, gated=gated, feat_ext=embed)
    put_attention(model.pool, params, gated)
    model.classifier = linear(params, "classify")
    logits, scores = model(x, return_att=True)
    return {"logits": logits, "attention": scores.softmax(-1)}


def clam(fields: dict[str, Any], params: Any, x: Any, embed: Any) -> dict[str, Any]:
    import torch
    from torchmil.models import CLAM_SB as Theirs

    def two_way_loss(pairs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        targets = targets[:, 0].long()
        if fields.get("instance_loss") == "ce":
            return torch.nn.functional.cross_entropy(pairs, targets)
        margin = 1.0 - torch.nn.functional.one_hot(targets, 2)
        true = pairs.gather(1, targets[:, None])
        return torch.logsumexp(pairs + margin - true, 1).mean()

    model = Theirs((WIDTH,), ATTENTION, k_sample=8, gated=True, feat_ext=embed)
    put_attention(model.pool, params, True)
    model.classifier = linear(params, "classify")
    for c in range(2):
        model.inst_classifiers[c] = linear(params, "instances", slice(2 * c, 2 * c + 2))
    model.inst_loss_fn.forward = two_way_loss
    logits, scores, h = model(x, return_att=True, return_emb=True)
    losses = [model.compute_inst_loss(scores, h, torch.tensor([label])) for label in (0, 1)]
    return {
        "logits": logits[0],
        "attention": scores.softmax(-1),
        "instance_loss": torch.stack(losses),
    }


def dsmil(fields: dict[str, Any], params: Any, x: Any, embed: Any) -> dict[str, Any]:
    from torchmil.models import DSMIL as Theirs

    model = Theirs((WIDTH,), ATTENTION, feat_ext=embed)
    model.q_nn, model.v_nn = linear(params, "query"), linear(params, "value")
    model.inst_classifier, model.bag_classifier = (
        linear(params, "score"),
        linear(params, "classify"),
    )
    pooled, attention, scores = model(x, return_att=True, return_inst_pred=True)
    return {
        "bag": pooled,
        "max": scores.max(1)[0],
        "logits": model.predict(x),
        "attention": attention[:, :, 0],
    }


def main() -> None:
    import torch

    from pathme_jax.mil.heads import HEADS

    stored = {}
    families = [("abmil", ABMIL, abmil), ("clam_sb", CLAM, clam), ("dsmil", DSMIL, dsmil)]
    for name, cases, theirs in families:
        for case, fields in cases.items():
            params = parameters(HEADS[name](**fields))
            embed = torch.nn.Sequential(linear(params, "embed"), torch.nn.ReLU())
            x = torch.from_numpy(np.array(bag().features))[None]
            with torch.no_grad():
                found = theirs(fields, params, x, embed)
            stored[case] = {key: value.double().tolist() for key, value in found.items()}
    STORED.write_text(json.dumps(stored))


if __name__ == "__main__":
    main()
