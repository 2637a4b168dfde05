"""Files of released weights: .safetensors, PyTorch's pickles and Hugging Face folders, as numpy arrays."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.encoders.zoo import Definition
from pathme_jax.errors import UserError
from pathme_jax.files import read_json

PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".torch")
# What a folder may hold, the first that is there; a pattern must match one file.
IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "*.safetensors",
    "*.pth",
    "*.pt",
    "*.torch",
    "*.bin",
)
# Where training code keeps the weights; a teacher is what is released.
WRAPPERS = ("teacher", "state_dict", "model", "model_state_dict")
GET_AGAIN = "The download may be incomplete: get the file again"


def files_of(path: str | Path) -> list[Path]:
    """The weight files at a file or in a Hugging Face folder, in order of their names.

    Raises:
        UserError: nothing there, none or several that could be meant, or a part of a set missing.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--weights {path}: no such file or folder", "Check the path")
    for pattern in IN_FOLDER:
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise UserError(
                f"{path}: {len(found)} files could be meant: {', '.join(f.name for f in found[:4])}",
                "Give one of them as --weights",
            )
        if found and pattern.endswith(".index.json"):
            return _parts(found[0])
        if found:
            return found
    raise UserError(f"{path}: no weights, such as model.safetensors", "Give the file itself")


def _parts(index: Path) -> list[Path]:
    try:
        parts = sorted({index.parent / name for name in read_json(index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of weights", GET_AGAIN) from error
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise UserError(
            f"{index}: {len(missing)} of {len(parts)} files it names are missing: {missing[0]}",
            "Download the whole folder",
        )
    return parts


def fingerprint(files: list[Path]) -> str:
    """sha256 of the file's bytes; of several, of all one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def read(files: list[Path]) -> dict[str, np.ndarray]:
    """Arrays by name; half precision stays as it is.

    Raises:
        UserError: a damaged file, an unsafe one, or one that holds no weights.
    """
    state: dict[str, np.ndarray] = {}
    for path in files:
        if path.suffix == ".safetensors":
            state.update(_read_safetensors(path))
        elif path.suffix in PICKLES:
            state.update(_read_pickle(path))
        else:
            raise UserError(
                f"{path}: cannot read *{path.suffix} as weights",
                f"Give .safetensors or one of {', '.join(PICKLES)}",
            )
    return state


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})", GET_AGAIN) from error


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    """Never runs code of the file: `weights_only` refuses everything but tensors and plain containers."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{path} is a file of PyTorch, which is not installed",
            "pip install 'pathme_jax[convert]', or give the .safetensors where there is one",
        ) from error
    import pickle

    try:
        content = _load(torch, path)
    except pickle.UnpicklingError as error:
        raise _unsafe(path, str(error)) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(f"{path}: not a whole file of PyTorch ({first[0]})", GET_AGAIN) from error
    return {
        name: (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy()
        for name, x in _peel(content, path, torch.Tensor).items()
    }


def _load(torch: Any, path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:  # files of before PyTorch 1.6 cannot be mapped
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _unsafe(path: Path, message: str) -> UserError:
    wanted = re.search(r"GLOBAL\s+(\S+)", message)
    if wanted is None:
        return UserError(f"{path}: not a file of PyTorch", GET_AGAIN)
    return UserError(
        f"{path}: wants to run {wanted[1]}; only tensors are read",
        "Ask its publisher for .safetensors, or save the weights alone where you trust the file",
    )


def _peel(content: Any, path: Path, tensor: type) -> Mapping[str, Any]:
    """The named tensors in what a file holds, from within the wrappers of training code."""
    while isinstance(content, Mapping):
        inner = next((w for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    named = isinstance(content, Mapping) and content and all(isinstance(k, str) for k in content)
    others = [k for k, x in content.items() if not isinstance(x, tensor)] if named else []
    if not named or others:
        raise UserError(
            f"{path}: not a dictionary of tensors ({', '.join(others[:3]) or type(content).__name__})",
            f"Save the weights alone, or under one of {', '.join(WRAPPERS)}",
        )
    return content


# ---- what config.json says beside them ---------------------------------------------------------------


def check_config(folder: Path, definition: Definition) -> None:
    """Refuses a folder whose config.json contradicts the definition; a file's keys would not tell.

    Weights fit a model of another number of heads, another epsilon, other statistics of its images, and
    its features are wrong all the same. Folders without config.json pass.

    Raises:
        UserError: listing what differs.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        said = _said(read_json(path))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a config ({error})", GET_AGAIN) from error
    expected = {
        "width": definition.model["width"],
        "depth": definition.model["depth"],
        "heads": definition.model["heads"],
        "patch": definition.model["patch"],
        "registers": definition.model["registers"],
        "epsilon": definition.model.get("epsilon", 1e-6),
        "mean": definition.input.mean,
        "std": definition.input.std,
    }
    differ = [
        f"{name} {value} instead of {expected[name]}"
        for name, value in said.items()
        # Phikon's file has said 1e-12 and 1e-6: below that no feature can tell.
        if not np.allclose(value, expected[name], rtol=1e-3, atol=1e-6 if name == "epsilon" else 0)
    ]
    if differ:
        raise UserError(
            f"{path}: contradicts {definition.name}: {'; '.join(differ)}",
            "Give the --encoder of these weights; where only config.json is wrong, the weights file"
            " itself as --weights",
        )


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of transformers or timm says, in our words."""
    timm = {**config.get("model_args", {}), **config}
    statistics = config.get("pretrained_cfg", config)
    names = {
        "width": ("hidden_size", "embed_dim", "num_features"),
        "depth": ("num_hidden_layers", "depth"),
        "heads": ("num_attention_heads", "num_heads"),
        "patch": ("patch_size",),
        "registers": ("num_register_tokens", "reg_tokens"),
        "epsilon": ("layer_norm_eps",),
    }
    said = {
        ours: next(timm[name] for name in theirs if name in timm)
        for ours, theirs in names.items()
        if any(name in timm for name in theirs)
    }
    return said | {name: statistics[name] for name in ("mean", "std") if name in statistics}
