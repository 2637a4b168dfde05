"""What timm's vision transformers answer, for tests/models/test_vit_reference.py. Needs torch and timm.

    python tests/references/make_vit.py        # writes vit_*.npz beside itself

Parameters and images are drawn from their names, so that the answers alone are stored.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

# Our ViT's fields, and what timm calls the rest. Two registers, no CLS position: DINOv2's "reg4" form.
COMMON = dict(patch=4, width=48, depth=3, heads=3, layer_scale=1.0, grid=6)
CASES: dict[str, dict[str, Any]] = {
    "mlp": dict(**COMMON, ffn="mlp", registers=0),
    "swiglu_registers": dict(**COMMON, ffn="swiglu", registers=2),
}
SIZES = {"native": (24, 24), "other": (16, 40)}  # of images, in pixels: 6 x 6 and 4 x 10 tokens


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of order 0.1 to 1, from the name alone; scales of norms and layers lie around 1."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    around = 1.0 if name.endswith("scale") or "scale_" in name else 0.0
    return (around + 0.2 * rng.normal(size=shape)).astype(np.float32)


def images(size: str) -> np.ndarray:
    return (
        np.random.default_rng(zlib.crc32(size.encode()))
        .normal(size=(2, *SIZES[size], 3))
        .astype(np.float32)
    )


def to_timm(ours: dict[str, np.ndarray], fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """Our parameters, by path, under timm's names and in torch's layout."""
    patch, width = fields["patch"], fields["width"]
    kernel = ours["patch_embed/kernel"].reshape(patch, patch, 3, width)
    state = {
        "cls_token": ours["cls_token"][None],
        "pos_embed": ours["positions"].reshape(1, -1, width),
        "patch_embed.proj.weight": kernel.transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": ours["patch_embed/bias"],
        "norm.weight": ours["norm/scale"],
        "norm.bias": ours["norm/bias"],
    }
    if fields["registers"]:
        state["reg_token"] = ours["registers"][None]
    names = {
        "norm_attention/scale": "norm1.weight",
        "norm_attention/bias": "norm1.bias",
        "attention/qkv/kernel": "attn.qkv.weight",
        "attention/qkv/bias": "attn.qkv.bias",
        "attention/out/kernel": "attn.proj.weight",
        "attention/out/bias": "attn.proj.bias",
        "scale_attention": "ls1.gamma",
        "norm_mlp/scale": "norm2.weight",
        "norm_mlp/bias": "norm2.bias",
        "mlp/up/kernel": "mlp.fc1.weight",
        "mlp/up/bias": "mlp.fc1.bias",
        "mlp/down/kernel": "mlp.fc2.weight",
        "mlp/down/bias": "mlp.fc2.bias",
        "scale_mlp": "ls2.gamma",
    }
    for own, theirs in names.items():
        for layer, value in enumerate(ours[f"blocks/layers/block/{own}"]):
            state[f"blocks.{layer}.{theirs}"] = value.T if own.endswith("kernel") else value
    return state


def answer(ours: dict[str, np.ndarray], fields: dict[str, Any], size: str) -> dict[str, np.ndarray]:
    """timm's {"cls": (b, d), "tokens": (b, n, d)} for the same parameters and images."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # timm imports it; without its compiled part it misses two operators
        torch.library.define("torchvision::nms", "(Tensor a, Tensor b, float c) -> Tensor")
        torch.library.define("torchvision::qnms", "(Tensor a, Tensor b, float c) -> Tensor")
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    gated = dict(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU, mlp_ratio=16 / 3)
    model = VisionTransformer(
        img_size=fields["grid"] * fields["patch"],
        patch_size=fields["patch"],
        num_classes=0,
        embed_dim=fields["width"],
        depth=fields["depth"],
        num_heads=fields["heads"],
        init_values=1e-5,
        reg_tokens=fields["registers"],
        no_embed_class=True,
        dynamic_img_size=True,
        **(gated if fields["ffn"] == "swiglu" else {}),
    ).eval()
    state = {k: torch.tensor(np.ascontiguousarray(v)) for k, v in to_timm(ours, fields).items()}
    model.load_state_dict(state)  # every name must be there, and no other
    with torch.no_grad():
        out = model.forward_features(torch.tensor(images(size)).permute(0, 3, 1, 2)).numpy()
    return {"cls": out[:, 0], "tokens": out[:, 1 + fields["registers"] :]}


def parameters(fields: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every parameter of our ViT, by path."""
    import jax
    import jax.numpy as jnp

    from pathme_jax.models.vit import ViT

    side = fields["grid"] * fields["patch"]
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(ViT(**fields).init, jax.random.key(0), image)["params"]
    paths = jax.tree_util.tree_flatten_with_path(shapes)[0]
    named = {"/".join(key.key for key in path): leaf.shape for path, leaf in paths}
    return {name: draw(name, shape) for name, shape in named.items()}


def main() -> None:
    for case, fields in CASES.items():
        ours = parameters(fields)
        out = {
            f"{size}/{name}": value
            for size in SIZES
            for name, value in answer(ours, fields, size).items()
        }
        np.savez_compressed(Path(__file__).parent / f"vit_{case}.npz", **out)


if __name__ == "__main__":
    main()
