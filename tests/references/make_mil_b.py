"""What torchmil's TransMIL and DTFD and torch's transformer answer, for tests/mil/heads.

    python tests/references/make_mil_b.py        # writes mil_b.json beside itself

needs torch, torchmil 1.0.2 and nystrom-attention 0.0.14. Parameters and bags are drawn from their names, so that
the answers alone are stored.

torchmil's Nyström attention has neither the convolution on the values nor the layer behind it. Case
"transmil_torchmil" is torchmil as it is, and ours with these two as zero and identity; case "transmil" is torchmil
with the attention of the package the authors of TransMIL used.
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
from pathme_jax.mil.heads.dtfd import DTFD
from pathme_jax.mil.heads.transformer import Transformer
from pathme_jax.mil.heads.transmil import TransMIL

STORED = Path(__file__).with_name("mil_b.json")
WIDTH, HIDDEN = 6, 16
LENGTHS = (11, 36)  # squares of side 4, with repeats, and 6, full; 17 and 37 tokens for 8 landmarks
NYSTROM: dict[str, Any] = dict(outputs=2, hidden=HIDDEN, heads=2, landmarks=8)
TIERS: dict[str, Any] = dict(outputs=1, hidden=HIDDEN, attention=4, groups=4)
HEADS: dict[str, Any] = {
    "transmil": TransMIL(**NYSTROM),
    "transmil_torchmil": TransMIL(**NYSTROM),
    "dtfd_afs": DTFD(**TIERS, distill="AFS"),
    # torchmil distils all instances of a pseudo-bag, and not the first few
    "dtfd_max": DTFD(**TIERS, distill="MaxS", keep=9),
    "transformer": Transformer(outputs=2, hidden=HIDDEN, heads=4, depth=3),
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values from the name alone: kernels by their fan-in, scales around one, the rest of order 0.3."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    fan_in = np.prod(shape[:-1]) if name.endswith("kernel") else 10
    around = 1.0 if name.endswith("scale") else 0.0
    return (around + rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)


def bag(length: int) -> Bag:
    rng = np.random.default_rng(length)
    cells = np.stack(np.divmod(rng.permutation(64)[:length], 8), 1)
    features = rng.normal(size=(length, WIDTH)).astype(np.float32)
    return Bag(jnp.asarray(features), jnp.ones(length, bool), jnp.asarray(cells.astype(np.int32)))


def parameters(case: str) -> Any:
    """The parameters of the case's head, each drawn from its path."""
    shapes = jax.eval_shape(HEADS[case].init, jax.random.key(0), bag(LENGTHS[0]))["params"]

    def value(path: Any, leaf: Any) -> np.ndarray:
        name = "/".join(key.key for key in path)
        if case == "transmil_torchmil" and "residual" in name:
            return np.zeros(leaf.shape, np.float32)
        if case == "transmil_torchmil" and "/out/" in name:
            return (
                np.eye(*leaf.shape, dtype=np.float32)
                if leaf.ndim == 2
                else np.zeros(HIDDEN, np.float32)
            )
        return draw(name, leaf.shape)

    return jax.tree_util.tree_map_with_path(value, shapes)


def answers(case: str, length: int) -> dict[str, np.ndarray]:
    found = json.loads(STORED.read_text())[case][str(length)]
    return {name: np.array(value) for name, value in found.items()}


# ---- torch -----------------------------------------------------------------------------------------------


def put(layer: Any, ours: Any) -> None:
    """Fills torch's linear layer, norm or convolution with our parameters."""
    import torch

    weight = np.array(ours["kernel"] if "kernel" in ours else ours["scale"])
    if weight.ndim > 1:  # ours has the channels last, (…, in, out)
        weight = np.moveaxis(weight, (-1, -2), (0, 1)) if weight.ndim > 2 else weight.T
    layer.weight.data = torch.from_numpy(weight.reshape(layer.weight.shape).copy())
    if "bias" in ours:
        layer.bias.data = torch.from_numpy(np.array(ours["bias"]))


def linear(ours: Any) -> Any:
    """torch's layer of our Dense."""
    import torch

    layer = torch.nn.Linear(*ours["kernel"].shape, bias="bias" in ours)
    put(layer, ours)
    return layer


def embedding(params: Any, activation: Any) -> Any:
    import torch

    return torch.nn.Sequential(linear(params["embed"]), activation)


def authors_attention() -> Any:
    """nystrom-attention's layer, called as torchmil calls its own."""
    import torch
    from nystrom_attention import NystromAttention

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = NystromAttention(HIDDEN, HIDDEN // 2, 2, num_landmarks=8)

        def forward(self, x: Any, mask: None = None, return_att: bool = False) -> Any:
            if not return_att:
                return self.inner(x)
            out, attention = self.inner(x, return_attn=True)
            front = attention.shape[-1] - x.shape[1]  # the package leaves its padding in
            return out, attention[:, :, front:, front:]

    return Attention()


def transmil(case: str, params: Any, given: Bag) -> dict[str, Any]:
    import torch
    from torchmil.models import TransMIL as Theirs

    model = Theirs(
        (WIDTH,), HIDDEN, n_heads=2, n_landmarks=8, feat_ext=embedding(params, torch.nn.ReLU())
    )
    model.cls_token.data = torch.from_numpy(np.array(params["cls"]))[None]
    for i, layer in enumerate(model.layers):
        ours = params[f"attention_{i}"]
        put(layer.norm1, params[f"norm_{i}"])
        if case == "transmil":
            layer.att_module = authors_attention()
            put(layer.att_module.inner.to_qkv, ours["qkv"])
            put(layer.att_module.inner.to_out[0], ours["out"])
            put(layer.att_module.inner.res_conv, ours["residual"])
        else:
            put(layer.att_module.qkv_nn, ours["qkv"])
    for width, conv in ((7, "proj"), (5, "proj1"), (3, "proj2")):
        put(getattr(model.pos_layer, conv), params["ppeg"][f"conv_{width}"])
    put(model.norm, params["norm"])
    model.classifier = linear(params["classify"])
    logits, attention = model.eval()(
        torch.from_numpy(np.array(given.features))[None], return_att=True
    )
    return {"logits": logits[0], "attention": attention[0]}


def dtfd(case: str, params: Any, given: Bag) -> dict[str, Any]:
    import torch
    from torchmil.models import DTFDMIL
    from torchmil.nn import AttentionPool

    groups = TIERS["groups"]
    mode = case.removeprefix("dtfd_")
    model = DTFDMIL((WIDTH,), 4, groups, mode, feat_ext=embedding(params, torch.nn.ReLU()))
    pools = []
    for i in (1, 2):
        pool = AttentionPool(HIDDEN, 4, gated=True)  # the paper's; torchmil's has no gate
        ours = params[f"attention_{i}"]
        pool.fc1, pool.fc_gated = linear(ours["tanh"]), linear(ours["gate"])
        pool.fc2 = linear(ours["attend"])
        pools.append(pool)
    model.attention_pool, model.u_attention_pool = pools
    model.classifier, model.u_classifier = linear(params["classify_1"]), linear(params["classify"])

    def strided(index: np.ndarray) -> None:
        """Our fixed split, in place of torchmil's shuffle."""
        index[:] = np.concatenate([index[g::groups].copy() for g in range(groups)])

    shuffle, np.random.shuffle = np.random.shuffle, strided
    x = torch.from_numpy(np.array(given.features))[None]
    logits, tier_1 = model(x, torch.ones(x.shape[:2]), return_pseudo_pred=True)
    np.random.shuffle = shuffle
    return {"logits": logits, "tier_1": tier_1[0]}


def transformer(case: str, params: Any, given: Bag) -> dict[str, Any]:
    import torch

    cells = torch.from_numpy(np.array(given.cells)).double()
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])  # of Press et al. for four heads
    bias = torch.zeros(4, len(cells) + 1, len(cells) + 1)
    bias[:, 1:, 1:] = -slopes[:, None, None] * torch.cdist(cells, cells).float()
    x = embedding(params, torch.nn.GELU())(torch.from_numpy(np.array(given.features)))
    x = torch.cat([torch.from_numpy(np.array(params["cls"])), x])[None]
    for i in range(HEADS[case].depth):
        layer = torch.nn.TransformerEncoderLayer(
            HIDDEN, 4, 4 * HIDDEN, 0.0, torch.nn.GELU(), batch_first=True, norm_first=True
        )
        ours = params[f"layer_{i}"]
        parts = [ours[name] for name in ("query", "key", "value")]
        layer.self_attn.in_proj_weight.data = torch.from_numpy(
            np.concatenate([part["kernel"].T for part in parts])
        )
        layer.self_attn.in_proj_bias.data = torch.from_numpy(
            np.concatenate([part["bias"] for part in parts])
        )
        put(layer.self_attn.out_proj, ours["out"])
        for theirs, own in (
            ("norm1", "norm_attention"),
            ("norm2", "norm_mlp"),
            ("linear1", "up"),
            ("linear2", "down"),
        ):
            put(getattr(layer, theirs), ours[own])
        y = layer.norm1(x)
        _, weights = layer.self_attn(y, y, y, attn_mask=bias, average_attn_weights=False)
        x = layer(x, src_mask=bias)
    norm, classify = torch.nn.LayerNorm(HIDDEN), linear(params["classify"])
    put(norm, params["norm"])
    attention = weights[0, :, 0, 1:]
    return {
        "logits": classify(norm(x[0, 0])),
        "attention": attention / attention.sum(1, keepdim=True),
    }


def main() -> None:
    import torch

    theirs = {"transmil": transmil, "dtfd": dtfd, "transformer": transformer}
    stored: dict[str, Any] = {}
    for case in HEADS:
        params = parameters(case)
        for length in LENGTHS:
            with torch.no_grad():
                found = theirs[case.split("_")[0]](case, params, bag(length))
            stored.setdefault(case, {})[str(length)] = {
                name: value.double().tolist() for name, value in found.items()
            }
    STORED.write_text(json.dumps(stored) + "\n")


if __name__ == "__main__":
    main()
