"""What the published definitions of the encoders answer, for tests/encoders/test_released.py.

    python tests/references/make_encoders.py     # needs torch, timm and transformers; writes encoder_*

Each architecture is built as its authors do, two blocks deep and at full width. Every entry of its
state dict is drawn from its name, and so is the image: the names, shapes and some of the answers are
stored. encoder_parameters.json holds the exact size of every full encoder, on torch's meta device.
"""

from __future__ import annotations

import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
DEPTH = 2
COLUMNS = 120  # stored of each token
OTHER = (
    4,
    6,
)  # patches of the smaller image; not square, so that rows and columns cannot be swapped
NORM = re.compile(r"(^|\.)(norm\d?|layernorm(_\w+)?|ln_\w+)\.weight$|\.gamma$|\.lambda1$")


def draw(name: str, shape: Iterable[int]) -> np.ndarray:
    """Values from the name alone: norms and LayerScale around 1, matrices so that what comes out is as
    large as what goes in, the rest of order 0.1 to 1."""
    shape = tuple(shape)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    around_zero = (rng.random(shape, np.float32) - 0.5) * np.float32(12**0.5)
    if NORM.search(name):
        return 1 + np.float32(0.2) * around_zero
    if name.endswith("weight") and len(shape) > 1:
        return around_zero / np.float32(np.prod(shape[1:]) ** 0.5)
    return np.float32(0.3) * around_zero


def image(height: int, width: int) -> np.ndarray:
    """(1, height, width, 3) float32, as if normalised."""
    return draw(f"{height} x {width}", (1, height, width, 3)) / np.float32(0.3)


def stored(answer: dict[str, Any]) -> dict[str, np.ndarray]:
    """What is kept of {"cls": (1, d), "tokens": (1, n, d)[, "pooled": (1, w)]}: some columns of CLS, of
    the first and last token and of the mean one."""
    cls, tokens = np.asarray(answer["cls"]), np.asarray(answer["tokens"])
    rows = np.concatenate([cls, tokens[:, 0], tokens[:, -1], tokens.mean(1)])
    columns = np.linspace(0, rows.shape[1] - 1, COLUMNS).astype(int)
    kept = {"rows": rows[:, columns]}
    return kept | ({"pooled": np.asarray(answer["pooled"])} if "pooled" in answer else {})


# ---- the published definitions -----------------------------------------------------------------------

GATED: dict[str, Any] = dict(mlp_layer="swiglu", act_layer="silu")
# Arguments of timm.create_model, from the model cards; at depth 2 below.
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "uni": ("vit_large_patch16_224", dict(init_values=1e-5)),
    "uni2-h": (
        "vit_giant_patch14_224",
        dict(
            depth=24,
            num_heads=24,
            init_values=1e-5,
            embed_dim=1536,
            mlp_ratio=2.66667 * 2,
            no_embed_class=True,
            reg_tokens=8,
            **GATED,
        ),
    ),
    "virchow": (
        "vit_huge_patch14_224",
        dict(init_values=1e-5, mlp_ratio=5.3375, global_pool="", **GATED),
    ),
    "virchow2": (
        "vit_huge_patch14_224",
        dict(init_values=1e-5, mlp_ratio=5.3375, global_pool="", reg_tokens=4, **GATED),
    ),
    "gigapath": (
        "vit_giant_patch14_dinov2",
        dict(patch_size=16, embed_dim=1536, depth=40, num_heads=24, mlp_ratio=5.33334),
    ),
    "gigapath-flash": (
        "vit_small_patch16_224",
        dict(mlp_ratio=2048 / 384, init_values=1e-5, global_pool="token", reg_tokens=0, **GATED),
    ),
    "h-optimus-0": (
        "vit_giant_patch14_reg4_dinov2",
        dict(init_values=1e-5, global_pool="token"),
    ),
    "h0-mini": (
        "vit_base_patch14_reg4_dinov2",
        dict(init_values=1e-5, mlp_ratio=4096 / 768, global_pool="", **GATED),
    ),
    "gpfm": ("vit_large_patch14_dinov2", dict(init_values=1e-5, qkv_bias=True)),
    "kaiko-s8": ("vit_small_patch8_224", {}),
    "kaiko-s16": ("vit_small_patch16_224", {}),
    "kaiko-b8": ("vit_base_patch8_224", {}),
    "kaiko-b16": ("vit_base_patch16_224", {}),
    "kaiko-l14": ("vit_large_patch14_reg4_dinov2", dict(img_size=518)),
    "lunit-s8": ("vit_small_patch8_224", {}),
    "lunit-s16": ("vit_small_patch16_224", {}),
    "openmidnight": ("vit_giant_patch14_reg4_dinov2", {}),
    "dinov2-base": ("vit_base_patch14_dinov2", dict(img_size=518)),
    "dinov2-small-reg4": ("vit_small_patch14_reg4_dinov2", dict(img_size=518)),
    "conch": ("vit_base_patch16_224", dict(img_size=448)),
    "conch-v1.5": ("vit_large_patch16_224", dict(init_values=1.0)),
}
SMALL = dict(hidden_size=384, num_attention_heads=6)
BASE = dict(hidden_size=768, num_attention_heads=12)
LARGE = dict(hidden_size=1024, num_attention_heads=16, num_hidden_layers=24)
GIANT = dict(hidden_size=1536, num_attention_heads=24, num_hidden_layers=40, use_swiglu_ffn=True)
# Class and config of transformers.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "phikon": ("ViT", dict(layer_norm_eps=1e-6, patch_size=16)),
    "phikon-v2": ("Dinov2", dict(**LARGE, patch_size=16)),
    "hibou-b": ("Dinov2WithRegisters", dict(**BASE, patch_size=14, use_swiglu_ffn=True)),
    "hibou-l": ("Dinov2WithRegisters", dict(**LARGE, patch_size=14, use_swiglu_ffn=True)),
    "midnight": ("Dinov2", dict(**GIANT, image_size=518, patch_size=14)),
    **{
        f"dinov2-{size}": ("Dinov2", dict(**fields, image_size=518, patch_size=14))
        for size, fields in dict(small=SMALL, base=BASE, large=LARGE, giant=GIANT).items()
    },
    **{
        f"dinov2-{size}-reg4": (
            "Dinov2WithRegisters",
            dict(**fields, image_size=518, patch_size=14),
        )
        for size, fields in dict(small=SMALL, base=BASE, large=LARGE, giant=GIANT).items()
    },
}
FAMILIES = (
    "uni",
    "uni2-h",
    "virchow",
    "virchow2",
    "gigapath",
    "gigapath-flash",
    "h-optimus-0",
    "h0-mini",
    "gpfm",
    "kaiko-s8",
    "kaiko-l14",
    "lunit-s8",
    "conch",
    "conch-v1.5",
    "phikon",
    "phikon-v2",
    "hibou-b",
    "hibou-l",
    "midnight",
    "openmidnight",
    "dinov2-base",
    "dinov2-small-reg4",
)


def sizes(name: str) -> dict[str, tuple[int, int]]:
    """Height and width in pixels: what the encoder is fed, and another."""
    if name in TIMM:
        architecture, fields = TIMM[name]
        patch = fields.get("patch_size", int(re.findall(r"patch(\d+)", architecture)[0]))
    else:
        patch = TRANSFORMERS[name][1]["patch_size"]
    native = 448 if name.startswith("conch") else 224
    return {"native": (native, native), "other": (OTHER[0] * patch, OTHER[1] * patch)}


def timm_model(name: str, **more: Any) -> Any:
    import timm
    import torch
    from timm.layers import SwiGLUPacked

    architecture, fields = TIMM[name]
    kinds = {"swiglu": SwiGLUPacked, "silu": torch.nn.SiLU}
    fields = {k: kinds.get(v, v) if isinstance(v, str) else v for k, v in fields.items()}
    if "img_size" not in fields:
        fields["img_size"] = 224
    return timm.create_model(architecture, num_classes=0, **{**fields, **more}).eval()


def transformers_model(name: str, **more: Any) -> Any:
    import transformers

    kind, fields = TRANSFORMERS[name]
    config = getattr(transformers, f"{kind}Config")(**{**fields, **more})
    extra = {"add_pooling_layer": False} if kind == "ViT" else {}
    return getattr(transformers, f"{kind}Model")(config, **extra).eval()


def conch_pooler(name: str) -> Any:
    """CoCa's attentional pooler, as a module with the released names."""
    import torch
    from torch import nn

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.zeros(1, 512))
            self.attn = nn.MultiheadAttention(512, 8, kdim=768, vdim=768, batch_first=True)
            self.ln_q, self.ln_k = nn.LayerNorm(512), nn.LayerNorm(768)

        def forward(self, tokens: Any) -> Any:
            tokens = self.ln_k(tokens)
            query = self.ln_q(self.query)[None].expand(len(tokens), -1, -1)
            return self.attn(query, tokens, tokens, need_weights=False)[0]

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.zeros(1, 768))
            self.ln_q, self.ln_k = nn.LayerNorm(768), nn.LayerNorm(1024)
            self.to_q = nn.Linear(768, 768, bias=False)
            self.to_kv = nn.Linear(1024, 1536, bias=False)
            self.to_out = nn.Linear(768, 768, bias=False)

        def forward(self, tokens: Any) -> Any:
            q = self.to_q(self.ln_q(self.query))[None].expand(len(tokens), -1, -1)
            k, v = self.to_kv(self.ln_k(tokens)).chunk(2, -1)
            q, k, v = (x.unflatten(-1, (8, 96)).transpose(1, 2) for x in (q, k, v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.to_out(mixed.transpose(1, 2).flatten(2))

    first = name == "conch"
    return nn.ModuleDict(
        {
            "attn_pool_contrast": First() if first else Second(),
            "ln_contrast": nn.LayerNorm(512 if first else 768),
        }
    ).eval()


# ---- their answers -------------------------------------------------------------------------------------


def meta_names(timm_names: dict[str, tuple[int, ...]], registers: bool) -> dict[str, Any]:
    """The keys of Meta's own files, {name: shape}, for those of timm's model."""
    out = {"mask_token": (1, timm_names["cls_token"][-1])}
    for name, shape in timm_names.items():
        if registers and name == "pos_embed":  # with CLS's, which timm adds to cls_token
            shape = (1, shape[1] + 1, shape[2])
        if timm_names["blocks.0.mlp.fc1.bias"][0] != timm_names["blocks.0.mlp.fc2.weight"][1]:
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        out["register_tokens" if name == "reg_token" else name] = shape
    return out


def offset_positions(positions: Any, shape: tuple[int, int]) -> Any:
    """DINO's rule, which Meta's models without registers and CONCH v1.5 follow."""
    import torch

    grid = int((positions.shape[1] - 1) ** 0.5)
    patches = positions[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    made = torch.nn.functional.interpolate(
        patches,
        scale_factor=tuple((n + 0.1) / grid for n in shape),
        mode="bicubic",
    )
    assert made.shape[-2:] == shape
    return torch.cat([positions[:, :1], made.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def released_names(name: str, names: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """{key: shape} of the released file, for timm's names."""
    if name == "gpfm":  # DINOv2's training file: four chunks of blocks, heads beside the backbone
        names = {"mask_token": (1, 1024), **names}
        names = {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", k): v for k, v in names.items()}
        heads = {"dino_head.mlp.0.weight": (4, 3), "dino_head.mlp.0.bias": (4,)}
        return {**{f"backbone.{k}": v for k, v in names.items()}, **heads}
    if name in ("openmidnight", "dinov2-base", "dinov2-small-reg4"):
        return meta_names(names, "reg_token" in names)
    if name.startswith("conch"):
        prefix = "visual." if name == "conch" else ""
        pooler = {k: tuple(v.shape) for k, v in conch_pooler(name).state_dict().items()}
        out = {f"trunk.{k}": v for k, v in names.items()} | pooler
        out = {f"{prefix}{k}": v for k, v in out.items()}
        text = {"visual.proj_contrast": (512, 512), "text.ln_final.bias": (3,), "logit_scale": ()}
        return {**out, **(text if name == "conch" else {})}
    return names


def timm_state(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """A drawn state dict as timm takes it, by timm's own conversion where it has one."""
    from timm.models.vision_transformer import _convert_dinov2

    if name == "gpfm":
        state = {k.removeprefix("backbone."): v for k, v in state.items() if "head" not in k}
        state = {re.sub(r"^blocks\.\d+\.", "blocks.", k): v for k, v in state.items()}
    if name == "conch":
        state = {k.removeprefix("visual."): v for k, v in state.items() if "visual." in k}
    if name.startswith("conch"):
        return {k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}
    return dict(_convert_dinov2(state, None)) if "mask_token" in state else state


def with_timm(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """({key: shape} of the file, {size: answer})."""
    import torch

    offset = name in ("dinov2-base", "conch-v1.5")
    model = timm_model(name, depth=DEPTH, dynamic_img_size=True)
    names = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    keys = released_names(name, names)
    state = {k: torch.tensor(draw(k, shape)) for k, shape in keys.items()}
    mine = timm_state(name, state)
    model.load_state_dict(mine)
    answers = {}
    for size, (h, w) in sizes(name).items():
        if offset:
            patch = model.patch_embed.patch_size[0]
            model = timm_model(name, depth=DEPTH, img_size=(h, w), dynamic_img_size=False)
            positions = offset_positions(mine["pos_embed"], (h // patch, w // patch))
            model.load_state_dict({**mine, "pos_embed": positions})
        out = model.forward_features(torch.tensor(image(h, w)).permute(0, 3, 1, 2))
        answers[size] = {"cls": out[:, 0], "tokens": out[:, model.num_prefix_tokens :]}
        if name.startswith("conch"):
            pooler = conch_pooler(name)
            prefix = "visual." if name == "conch" else ""
            pooler.load_state_dict({k: state[prefix + k] for k in pooler.state_dict()})
            pooled = pooler["attn_pool_contrast"](out)[:, 0]
            answers[size]["pooled"] = pooler["ln_contrast"](pooled)
    return keys, answers


def with_transformers(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same, through files: in memory transformers has other names."""
    import torch
    from safetensors.numpy import load_file, save_file

    model = transformers_model(name, num_hidden_layers=DEPTH)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        keys = {k: tuple(v.shape) for k, v in load_file(file).items()}
        save_file({k: draw(k, shape) for k, shape in keys.items()}, file, {"format": "pt"})
        extra = {"add_pooling_layer": False} if TRANSFORMERS[name][0] == "ViT" else {}
        model, info = type(model).from_pretrained(folder, output_loading_info=True, **extra)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    answers = {}
    for size, (h, w) in sizes(name).items():
        how = {"interpolate_pos_encoding": True} if TRANSFORMERS[name][0] == "ViT" else {}
        pixels = torch.tensor(image(h, w)).permute(0, 3, 1, 2)
        out = model.eval()(pixels, **how).last_hidden_state
        lead = 1 + getattr(model.config, "num_register_tokens", 0)
        answers[size] = {"cls": out[:, 0], "tokens": out[:, lead:]}
    return keys, answers


def count(name: str) -> int:
    """Exact number of the full encoder's parameters, without the mask token."""
    import torch

    with torch.device("meta"):
        if name in TRANSFORMERS:
            model = transformers_model(name)
        else:
            model = timm_model(name)
            if name == "openmidnight":  # Meta's files have CLS's position too
                return sum(p.numel() for p in model.parameters()) + 1536
        parts = [model, *([conch_pooler(name)] if name.startswith("conch") else [])]
    return sum(
        p.numel() for part in parts for k, p in part.named_parameters() if "mask_token" not in k
    )


def main() -> None:
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # timm imports it; without its compiled part it misses two operators
        torch.library.define("torchvision::nms", "(Tensor a, Tensor b, float c) -> Tensor")
        torch.library.define("torchvision::qnms", "(Tensor a, Tensor b, float c) -> Tensor")
    keys, arrays = {}, {}
    torch.set_grad_enabled(False)
    for name in FAMILIES:
        make: Callable = with_timm if name in TIMM else with_transformers
        keys[name], answers = make(name)
        for size, answer in answers.items():
            for what, value in stored(answer).items():
                arrays[f"{name}/{size}/{what}"] = value
                print(name, size, what, value.shape, float(np.abs(value).max()))
    np.savez_compressed(HERE / "encoder_answers.npz", **arrays)
    (HERE / "encoder_keys.json").write_text(json.dumps(keys) + "\n")
    same = {
        "h-optimus-1": "h-optimus-0",
        "lunit-s8-timm": "lunit-s8",
        "lunit-s16-timm": "lunit-s16",
    }
    counts = {name: count(name) for name in sorted({*TIMM, *TRANSFORMERS})}
    counts |= {name: counts[other] for name, other in same.items()}
    (HERE / "encoder_parameters.json").write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
