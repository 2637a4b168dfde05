"""Released weights and our parameters, one as the other: names, layouts, positions.

Every dialect is first put into timm's names, then into our tree; the way back starts from the same
table. What is there and what is expected must agree to the last key and shape.

The way to timm's names only reshapes, transposes and indexes, so that `jax.eval_shape` of it says what a
file must hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from pathme_jax.encoders import patch
from pathme_jax.encoders.zoo import Definition
from pathme_jax.errors import UserError
from pathme_jax.training.contract import flat, nested

State = dict[str, np.ndarray]  # by name, in PyTorch's layout
SHOWN = 3  # keys of each kind in an error


# ---- timm's names and layouts beside ours -----------------------------------------------------------


class Layout(NamedTuple):
    """How one array is laid out in PyTorch and here."""

    to_torch: Callable[[Any], Any]
    to_flax: Callable[[Any], Any]


PLAIN = Layout(lambda x: x, lambda x: x)
MATRIX = Layout(lambda x: x.T, lambda x: x.T)
TOKENS = Layout(lambda x: x[None], lambda x: x[0])
GRID = Layout(
    lambda x: x.reshape(1, -1, x.shape[-1]),
    lambda x: x.reshape(math.isqrt(x.shape[1]), math.isqrt(x.shape[1]), -1),
)
# A convolution's (d, 3, p, p) and the matrix (p p 3, d) of a patch's rows, columns, channels.
PATCHES = Layout(
    lambda x: x.reshape(*[math.isqrt(len(x) // 3)] * 2, 3, -1).transpose(3, 2, 0, 1),
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, len(x)),
)


def _dense(ours: str, theirs: str) -> dict[str, tuple[str, Layout]]:
    return {
        f"{ours}/kernel": (f"{theirs}.weight", MATRIX),
        f"{ours}/bias": (f"{theirs}.bias", PLAIN),
    }


def _norm(ours: str, theirs: str) -> dict[str, tuple[str, Layout]]:
    return {
        f"{ours}/scale": (f"{theirs}.weight", PLAIN),
        f"{ours}/bias": (f"{theirs}.bias", PLAIN),
    }


POOL = "attn_pool_contrast"  # CONCH's name: timm has no such pooler
NAMES: dict[str, tuple[str, Layout]] = {
    "backbone/cls_token": ("cls_token", TOKENS),
    "backbone/registers": ("reg_token", TOKENS),
    "backbone/mask_token": ("mask_token", TOKENS),
    "backbone/positions": ("pos_embed", GRID),
    "backbone/patch_embed/kernel": ("patch_embed.proj.weight", PATCHES),
    "backbone/patch_embed/bias": ("patch_embed.proj.bias", PLAIN),
    **_norm("backbone/norm", "norm"),
    "pooler/probe": (f"{POOL}.query", PLAIN),
    **_norm("pooler/norm_query", f"{POOL}.ln_q"),
    **_norm("pooler/norm_tokens", f"{POOL}.ln_k"),
    **_dense("pooler/query", f"{POOL}.attn.q"),
    **_dense("pooler/key", f"{POOL}.attn.k"),
    **_dense("pooler/value", f"{POOL}.attn.v"),
    **_dense("pooler/out", f"{POOL}.attn.out_proj"),
    **_norm("pooler/norm", "ln_contrast"),
}
# Of one block, "blocks.<layer>." there; here the layers are stacked along the first axis.
STACKED = "backbone/blocks/layers/block/"
BLOCK_NAMES: dict[str, tuple[str, Layout]] = {
    **_norm("norm_attention", "norm1"),
    **_dense("attention/qkv", "attn.qkv"),
    **_dense("attention/out", "attn.proj"),
    "scale_attention": ("ls1.gamma", PLAIN),
    **_norm("norm_mlp", "norm2"),
    **_dense("mlp/up", "mlp.fc1"),
    **_dense("mlp/down", "mlp.fc2"),
    "scale_mlp": ("ls2.gamma", PLAIN),
}


def to_timm_state(params: patch.Params) -> State:
    """Parameters under timm's names, for a VisionTransformer with `no_embed_class=True`.

    `mask_token`, which timm does not have, is left out; a pooler's keys are CONCH's.
    """
    state = _to_timm(params)
    del state["mask_token"]
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


def _to_timm(params: patch.Params) -> dict[str, Any]:
    state = {}
    for path, value in flat(dict(params)).items():
        if path.startswith(STACKED):
            name, layout = BLOCK_NAMES[path.removeprefix(STACKED)]
            for layer in range(len(value)):
                state[f"blocks.{layer}.{name}"] = layout.to_torch(value[layer])
        else:
            name, layout = NAMES[path]
            state[name] = layout.to_torch(value)
    return state


def to_transformers_state(params: patch.Params, definition: Definition) -> State:
    """Parameters under the names of Hugging Face's Dinov2Model, or with registers
    Dinov2WithRegistersModel, as their files have them.

    LayerScale is 1 where the encoder has none; CLS's own position is 0, being part of `cls_token`.

    Raises:
        UserError: the encoder has a pooler.
    """
    if definition.pooler is not None:
        raise UserError(
            f"{definition.name}: Dinov2Model has no attentional pooler",
            "Export it in another format",
        )
    timm = _to_timm(params)
    width = timm["cls_token"].shape[-1]
    timm["pos_embed"] = np.concatenate([np.zeros((1, 1, width), np.float32), timm["pos_embed"]], 1)
    for layer in range(definition.model["depth"]):
        for name in ("ls1.gamma", "ls2.gamma"):
            timm.setdefault(f"blocks.{layer}.{name}", np.ones(width, np.float32))
    state = {}
    for name, value in timm.items():
        if ".attn.qkv." in name:
            parts = zip(("query", "key", "value"), np.split(value, 3), strict=True)
            named = {name.replace("attn.qkv", f"attention.attention.{p}"): x for p, x in parts}
        else:
            named = {name: value}
        for key, x in named.items():
            state[_renamed(key, _transformers_names(definition))] = np.ascontiguousarray(x)
    return state


def _transformers_names(definition: Definition) -> tuple[tuple[str, str], ...]:
    gated = definition.model["ffn"] == "swiglu"
    return (
        (r"^(cls_token|mask_token)$", r"embeddings.\1"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^norm\.", "layernorm."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
        (r"\.mlp\.fc1\.", ".mlp.weights_in." if gated else ".mlp.fc1."),
        (r"\.mlp\.fc2\.", ".mlp.weights_out." if gated else ".mlp.fc2."),
        (r"^blocks\.", "encoder.layer."),
    )


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key


# ---- every dialect into timm's names ----------------------------------------------------------------

# In this order, each to every key.
RENAMES = (
    # of wrappers and of models that a backbone is part of
    (r"^((module|_orig_mod|teacher|backbone|visual|trunk|vit|dinov2|model)\.)+", ""),
    # DINOv2; chunks of blocks number their blocks through
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^register_tokens$", "reg_token"),
    # transformers: as its files have it, and as its version 5 has it in memory
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(?=\d)", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
    # CONCH's pooler: nn.MultiheadAttention in the first, plain matrices in 1.5
    (rf"^{POOL}\.attn\.([qkv])_proj_weight$", rf"{POOL}.attn.\1.weight"),
    (rf"^{POOL}\.to_q\.", f"{POOL}.attn.q."),
    (rf"^{POOL}\.to_out\.", f"{POOL}.attn.out_proj."),
)
# What is one array there and several here, or the other way round; along the first axis.
_Q, _K, _V = (f"{POOL}.attn.{x}" for x in "qkv")
SPLIT = {
    f"{POOL}.attn.in_proj_bias": (f"{_Q}.bias", f"{_K}.bias", f"{_V}.bias"),
    f"{POOL}.to_kv.weight": (f"{_K}.weight", f"{_V}.weight"),
}
JOINED = {
    "attn.qkv": ("attn.query", "attn.key", "attn.value"),
    "mlp.fc1": ("mlp.gate_proj", "mlp.up_proj"),
}


def to_params(state: State, definition: Definition, where: str) -> dict[str, Any]:
    """Our parameters from a released state dict in any dialect.

    Args:
        state: by the names of the file; emptied, so that no second copy of a large model is held.
        where: what to call the file in errors.

    Returns:
        {"backbone": …[, "pooler": …]}, float32.

    Raises:
        UserError: a key is missing, unknown, there twice, of another shape or not finite.
    """
    timm = to_timm(state, definition, where)
    expected = patch.abstract(definition)
    _check(timm, jax.eval_shape(_to_timm, expected), definition.name, where)
    params: dict[str, np.ndarray] = {}
    for path, x in flat(expected).items():
        if path.startswith(STACKED):
            name, layout = BLOCK_NAMES[path.removeprefix(STACKED)]
            value = np.empty(x.shape, np.float32)
            for layer in range(len(value)):
                value[layer] = layout.to_flax(timm.pop(f"blocks.{layer}.{name}"))
        else:
            name, layout = NAMES[path]
            value = np.ascontiguousarray(layout.to_flax(timm.pop(name)), np.float32)
        if not np.isfinite(value).all():
            raise UserError(
                f"{where}: {path.removeprefix(STACKED)} has values that are not finite",
                "Get the file again",
            )
        params[path] = value
    return nested(params)


def to_timm(state: State, definition: Definition, where: str) -> State:
    """A released state dict under timm's names, its positions those of patches alone. Empties `state`."""
    timm: State = {}
    for key in list(state):
        value = state.pop(key)
        if is_unused(key, definition):
            continue
        for name, part in _parts(_renamed(key, RENAMES), value).items():
            if name in timm:
                raise UserError(
                    f"{where}: {key} is there twice, once under another prefix",
                    "Keep one model's weights in the file",
                )
            timm[name] = part
    for layer in range(definition.model["depth"]):
        _join(timm, f"blocks.{layer}.")
    if "mask_token" not in timm:  # only masked training needs one
        timm["mask_token"] = np.zeros((1, definition.model["width"]), np.float32)
    _fold_positions(timm, definition, where)
    return timm


def _parts(name: str, value: np.ndarray) -> State:
    """One entry as one, or as the several that we have for it."""
    names = SPLIT.get(name, ())
    if not names or value.ndim == 0 or len(value) % len(names):
        return {name: value}
    return dict(zip(names, np.split(value, len(names)), strict=True))


def _join(timm: State, block: str) -> None:
    """Puts a block's separate matrices together where all of them are there."""
    for whole, pieces in JOINED.items():
        for kind in ("weight", "bias"):
            names = [f"{block}{piece}.{kind}" for piece in pieces]
            if all(name in timm for name in names):
                timm[f"{block}{whole}.{kind}"] = np.concatenate([timm.pop(name) for name in names])


def is_unused(key: str, definition: Definition) -> bool:
    """Whether no feature needs this key of a released file."""
    return any(re.fullmatch(pattern, key) for pattern in definition.unused)


def _fold_positions(timm: State, definition: Definition, where: str) -> None:
    """Adds the positions of CLS and registers to these tokens, and leaves those of patches.

    How many positions there are tells whose they are: conversions by others fold them as well.
    """
    registers, grid = definition.model["registers"], definition.model["grid"]
    lead = {"cls_token": 1, "reg_token": registers} if registers else {"cls_token": 1}
    if "pos_embed" not in timm or not set(lead) <= set(timm):
        return  # `_check` tells what is missing
    positions, width = timm["pos_embed"], definition.model["width"]
    if any(timm[name].shape != (1, n, width) for name, n in lead.items()):
        return  # or of another shape
    before = positions.shape[1] - grid**2 if positions.ndim == 3 else -1
    if before not in (0, 1, 1 + registers):
        raise UserError(
            f"{where}: positions of shape {positions.shape}{_grid_words(positions, registers)};"
            f" {definition.name} has a grid of {grid} x {grid}",
            "Give the released file of this encoder; converting never interpolates positions",
        )
    start = 0
    for name, count in lead.items():
        if start < before:
            timm[name] = timm[name].astype(np.float32) + positions[:, start : start + count]
        start += count
    timm["pos_embed"] = positions[:, before:]


def _grid_words(positions: np.ndarray, registers: int) -> str:
    """ ", a grid of 37 x 37", where a square is left without those of CLS and registers."""
    if positions.ndim == 3:
        for before in (1, 0, 1 + registers):
            left = max(positions.shape[1] - before, 0)
            if left and math.isqrt(left) ** 2 == left:
                return f", a grid of {math.isqrt(left)} x {math.isqrt(left)}"
    return ""


def _check(timm: State, expected: Mapping[str, Any], name: str, where: str) -> None:
    """Every key is expected and every expected key there, each of its shape."""
    missing = sorted(set(expected) - set(timm))
    unknown = sorted(set(timm) - set(expected))
    other = [
        f"{key} {timm[key].shape} instead of {expected[key].shape}"
        for key in sorted(set(expected) & set(timm))
        if timm[key].shape != expected[key].shape
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": other}
    differ = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in kinds.items() if keys]
    if differ:
        raise UserError(
            f"{where}: not the weights of {name}; by timm's names, {'; '.join(differ)}",
            "Give the file of this encoder, or the --encoder of this file",
        )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", …" if len(keys) > SHOWN else "")
