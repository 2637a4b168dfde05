"""An encoder in the forms that others load, each complete or not there at all.

<out>/export.json      which encoder this is
<out>/README.md        its model card
<out>/flax/            what `encoders.load` reads
<out>/timm/            model.safetensors and config.json for timm.create_model("local-dir:…")
<out>/transformers/    the same for AutoModel.from_pretrained, as Dinov2Model or with registers
<out>/stablehlo/       a program for CPU, CUDA and TPU, and its parameters: needs jax, not pathme_jax
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.encoders import card, encoder, released
from pathme_jax.encoders.zoo import Definition
from pathme_jax.errors import UserError
from pathme_jax.files import atomic, digest, read_json, write_json
from pathme_jax.models.resample import resize_positions
from pathme_jax.models.transformer import gated_width
from pathme_jax.models.vit import ViT
from pathme_jax.training import checkpoints
from pathme_jax.training.contract import flat, nested

PLATFORMS = ("cpu", "cuda", "tpu")
TILE_PX = 256  # of an encoder that does not say what it was made for
# An architecture of timm by its MLP, every other argument being given. It must be one whose default MLP
# this is: a class cannot stand in a config.json.
TIMM_ARCHITECTURES = {"mlp": "vit_base_patch16_224", "swiglu": "vit_giant_patch14_dinov2"}
TIMM_RULE = "bicubic antialias"  # how it interpolates positions
PIL_RESAMPLE = {"bilinear": 2, "bicubic": 3}


@dataclasses.dataclass(frozen=True)
class Exportable:
    """An encoder and what the formats need to know of it.

    Attributes:
        folder: where it was loaded from.
        name: what `encoders.load` will call the export.
        params: {"backbone": …[, "pooler": …]} where there is a definition, else the product as it is.
        sha256: of these.
        definition: under the encoder's name and with every field of the ViT; None for what is no ViT of
            images.
        tile_px: side of the square tiles it will be given.
        inputs: names to shapes and types of what one sample is; {} where that cannot be told.
    """

    folder: Path
    encoder: encoder.Encoder
    name: str
    params: Mapping[str, Any]
    sha256: str
    definition: Definition | None
    tile_px: int
    inputs: Mapping[str, Any]

    @property
    def side(self) -> int:
        """Side in pixels of what the ViT sees of a tile."""
        assert self.definition
        how = self.definition.input
        side = how.crop or how.resize or self.tile_px
        return min(side, how.part or side)


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export left.

    Attributes:
        written, found: formats written now, and found done.
        left_out: format to why this encoder cannot be told in it.
        warnings: a line for each teacher, expert or base that restricts use.
    """

    written: Sequence[str]
    found: Sequence[str]
    left_out: Mapping[str, str]
    warnings: Sequence[str]


def export(
    path: str | Path,
    out: str | Path,
    *,
    formats: Sequence[str] = (),
    tile_px: int = 0,
    licence: str = "",
) -> Exported:
    """Writes an encoder's formats and its card. What is there is left as it is; the card is written anew.

    Args:
        path: anything `encoders.load` takes that has weights.
        formats: of `FORMATS`; none for all that this encoder can be told in.
        tile_px: side of the tiles; 0 for the one in the encoder's definition. StableHLO is for this side
            alone.
        licence: SPDX name for the exported weights; "" keeps what an earlier export said.

    Raises:
        UserError: no such encoder or format, one asked for that cannot tell it, or a folder that holds
            something else.
    """
    out = Path(out)
    card.check_licence(licence)
    model = read(path, tile_px)
    left_out = {name: why for name in FORMATS if (why := refusal(model, name))}
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"no format {name!r}", f"Expected some of {', '.join(FORMATS)}")
        if name in left_out:
            raise UserError(f"{model.name} as {name}: {left_out[name]}", "Leave it out")
    wanted = [name for name in FORMATS if name in (formats or set(FORMATS) - set(left_out))]
    licence = _claim(out, model, licence)
    written = [name for name in wanted if not (out / name).exists()]
    for name in written:
        with atomic(out / name) as temporary:
            FORMATS[name](model, temporary)
    there = [name for name in FORMATS if (out / name).exists()]
    history = card.history(model.folder, model.encoder)
    with atomic(out / "README.md") as temporary:
        temporary.write_text(card.text(model, history, formats=there, licence=licence))
    warnings = card.warnings(model.encoder.made_from)
    return Exported(written, [name for name in wanted if name not in written], left_out, warnings)


def read(path: str | Path, tile_px: int = 0) -> Exportable:
    """Raises UserError where nothing with weights is there, or tiles of that side do not fit it."""
    found = encoder.load(path, "float32")
    if not found.params:
        raise UserError(f"{path} has no weights", "Export a converted or trained encoder")
    if found.definition is None:
        inputs, sha = _inputs(path, found, tile_px or TILE_PX), found.about["sha256"]
        return Exportable(
            Path(path), found, found.name, found.params, sha, None, tile_px or TILE_PX, inputs
        )
    named = found.name.rpartition("-")[0]  # without the hash
    definition = dataclasses.replace(found.definition, name=named)
    params = found.params if "backbone" in found.params else {"backbone": found.params}
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    sha = checkpoints.fingerprint(params)
    name = encoder.named(definition, sha)
    vit = ViT(**definition.model)
    fields = {f.name: getattr(vit, f.name) for f in dataclasses.fields(vit) if f.init}
    definition = dataclasses.replace(
        definition, model={k: v for k, v in fields.items() if k not in ("parent", "name")}
    )
    tile_px = tile_px or definition.tile_px
    image = {"image": jax.ShapeDtypeStruct((tile_px, tile_px, 3), jnp.uint8)}
    model = Exportable(Path(path), found, name, params, sha, definition, tile_px, image)
    if model.side % vit.patch:
        raise UserError(
            f"--tile-px {tile_px}: the model sees {model.side} px, which do not divide into patches of"
            f" {vit.patch} px",
            "Give another side",
        )
    return model


def _inputs(path: str | Path, found: encoder.Encoder, tile_px: int) -> Mapping[str, Any]:
    if found.record == "fields":
        return {"image": jax.ShapeDtypeStruct((tile_px, tile_px, 3), jnp.uint8)}
    _, method, params, _ = checkpoints.load_product(path)
    tell = getattr(method, "inputs", None)
    return tell(params) if tell else {}


def refusal(model: Exportable, name: str) -> str:
    """Why this encoder cannot be told in that format; "" where it can."""
    definition = model.definition
    if name == "flax":
        return ""
    if name == "stablehlo":
        return "" if model.inputs else "its method does not say what it reads (`inputs`)"
    if definition is None:
        return "it is no ViT that reads images"
    if definition.pooler is not None:
        return f"{name} has no attentional pooler"
    if name == "timm" and definition.model["epsilon"] != 1e-6:
        return "its LayerNorm's epsilon is not 1e-6, which a config.json of timm cannot say"
    if name == "transformers" and _whole_ratio(definition) is None:
        return "its MLP's width is no whole multiple of the model's, as transformers has it"
    return ""


def _claim(out: Path, model: Exportable, licence: str) -> str:
    """Makes the folder this encoder's, or sees that it is; returns the licence.

    Raises:
        UserError: it holds something else.
    """
    what = {"sha256": model.sha256, "tile_px": model.tile_px}
    if model.definition:
        what["definition"] = digest(dataclasses.asdict(model.definition))
    about: dict[str, Any] = {}
    if (out / "export.json").exists():
        about = read_json(out / "export.json")
        differs = [key for key in what if about["what"].get(key) != what[key]]
        if differs:
            raise UserError(
                f"{out} holds an export of {about['encoder']} with another {', '.join(differs)}",
                "Give another --out, or the --encoder and --tile-px of that export",
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there and is no export", "Give another --out")
    licence = licence or about.get("licence") or card.UNSPECIFIED
    out.mkdir(parents=True, exist_ok=True)
    content = {"encoder": model.name, "what": what, "licence": licence}
    write_json(out / "export.json", content)
    return licence


# ---- ours ------------------------------------------------------------------------------------------


def _write_flax(model: Exportable, folder: Path) -> None:
    """A converted encoder's folder; for what is no ViT of images, a work folder without its checkpoints."""
    found = model.encoder
    if found.definition and model.definition:
        definition = dataclasses.replace(found.definition, name=model.definition.name)
        history = card.history(model.folder, found)
        encoder.save(folder, definition, model.params, made_from=found.made_from, history=history)
        return
    folder.mkdir()
    home = card.home(model.folder)
    run = read_json(home / "config.json")
    run["config"] = run["identity"]["config"]  # without paths and settings of the machine it ran on
    shutil.copytree(model.folder / "product", folder / "product")
    shutil.copy(model.folder / "product.json", folder)
    if (home / "metrics.jsonl").exists():
        shutil.copy(home / "metrics.jsonl", folder)
    write_json(folder / "config.json", run)


# ---- PyTorch ---------------------------------------------------------------------------------------


def _write_timm(model: Exportable, folder: Path) -> None:
    assert model.definition
    params, definition = _with_positions_for(model, TIMM_RULE)
    folder.mkdir()
    _write_state(folder, released.to_timm_state(params))
    write_json(folder / "config.json", _timm_config(definition, model.side))


def _write_transformers(model: Exportable, folder: Path) -> None:
    assert model.definition
    registers = model.definition.model["registers"]
    rule = "bicubic antialias" if registers else "bicubic"
    params, definition = _with_positions_for(model, rule)
    folder.mkdir()
    _write_state(folder, released.to_transformers_state(params, definition))
    write_json(folder / "config.json", _transformers_config(definition))
    write_json(folder / "preprocessor_config.json", _image_processor(definition, model.side))


def _write_state(folder: Path, state: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    state = {name: np.ascontiguousarray(value, np.float32) for name, value in state.items()}
    path = folder / "model.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)  # it makes files for their owner alone


def _with_positions_for(model: Exportable, rule: str) -> tuple[Mapping[str, Any], Definition]:
    """Parameters and definition for a library that interpolates positions by `rule`.

    Where ours is another, they are interpolated here, once, to the size of the model's input.
    """
    assert model.definition
    vit, grid = model.definition.model, model.side // model.definition.model["patch"]
    if vit["resample"] == rule or vit["grid"] == grid:
        return model.params, model.definition
    backbone = dict(model.params["backbone"])
    positions = jnp.asarray(backbone["positions"])
    backbone["positions"] = np.asarray(resize_positions(positions, (grid, grid), vit["resample"]))
    definition = dataclasses.replace(model.definition, model={**vit, "grid": grid})
    return {**model.params, "backbone": backbone}, definition


def _hidden(definition: Definition) -> int:
    """Columns of the MLP's first matrix: twice the hidden width for SwiGLU."""
    vit = definition.model
    if vit["ffn"] == "mlp":
        return round(vit["width"] * vit["mlp_ratio"])
    return 2 * gated_width(vit["width"], vit["mlp_ratio"])


def _timm_config(definition: Definition, side: int) -> dict[str, Any]:
    vit, how = definition.model, definition.input
    pool = "token" if definition.output == "cls" else ""
    width, hidden = vit["width"], _hidden(definition)
    exact = int(width * (hidden / width)) == hidden  # timm rounds the product down
    return {
        "architecture": TIMM_ARCHITECTURES[vit["ffn"]],
        "num_classes": 0,
        "num_features": width,
        "global_pool": pool,
        "model_args": {
            "img_size": vit["patch"] * vit["grid"],
            "dynamic_img_size": True,
            "patch_size": vit["patch"],
            "embed_dim": width,
            "depth": vit["depth"],
            "num_heads": vit["heads"],
            "mlp_ratio": (hidden if exact else hidden + 0.5) / width,
            "init_values": vit["layer_scale"],  # 0 leaves LayerScale out
            "reg_tokens": vit["registers"],
            "no_embed_class": True,
            "global_pool": pool,
            "num_classes": 0,
        },
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": how.resample.split()[0],
            "crop_pct": how.crop / how.resize if how.crop and how.resize else 1.0,
            "crop_mode": "center",
            "mean": list(how.mean),
            "std": list(how.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _whole_ratio(definition: Definition) -> int | None:
    """The whole `mlp_ratio` with which transformers makes an MLP of this width."""
    vit = definition.model
    for ratio in range(1, 17):
        mlp = vit["width"] * ratio
        made = 2 * gated_width(vit["width"], ratio) if vit["ffn"] == "swiglu" else mlp
        if made == _hidden(definition):
            return ratio
    return None


def _transformers_config(definition: Definition) -> dict[str, Any]:
    vit = definition.model
    more: dict[str, Any] = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
    if vit["registers"]:
        more = {
            "architectures": ["Dinov2WithRegistersModel"],
            "model_type": "dinov2_with_registers",
            "num_register_tokens": vit["registers"],
        }
    return {
        **more,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": vit["width"],
        "image_size": vit["patch"] * vit["grid"],
        "layer_norm_eps": vit["epsilon"],
        "layerscale_value": 1.0,
        "mlp_ratio": _whole_ratio(definition),
        "num_attention_heads": vit["heads"],
        "num_channels": 3,
        "num_hidden_layers": vit["depth"],
        "patch_size": vit["patch"],
        "qkv_bias": True,
        "torch_dtype": "float32",
        "use_swiglu_ffn": vit["ffn"] == "swiglu",
    }


def _image_processor(definition: Definition, side: int) -> dict[str, Any]:
    how = definition.input
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": bool(how.resize),
        "size": {"shortest_edge": how.resize or side},
        "resample": PIL_RESAMPLE[how.resample.split()[0]],
        "do_center_crop": bool(how.crop),
        "crop_size": {"height": how.crop or side, "width": how.crop or side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }


# ---- StableHLO -------------------------------------------------------------------------------------


def _write_stablehlo(model: Exportable, folder: Path) -> None:
    """The weights stay out of the program: a billion of them would not fit into its protobuf."""
    from jax import export

    (b,) = export.symbolic_shape("b")
    batch = {name: jax.ShapeDtypeStruct((b, *x.shape), x.dtype) for name, x in model.inputs.items()}
    apply = model.encoder.apply

    def images(params: Mapping[str, Any], image: Any) -> Any:
        return apply(nested(dict(params)), {"image": image})

    def samples(params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        return apply(nested(dict(params)), batch)

    params = {path: np.asarray(x) for path, x in flat(model.encoder.params).items()}
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()}
    single = set(batch) == {"image"}
    program = export.export(jax.jit(images if single else samples), platforms=PLATFORMS)(
        shapes, batch["image"] if single else batch
    )
    folder.mkdir()
    (folder / "encoder.stablehlo").write_bytes(program.serialize())
    np.savez(folder / "params.npz", **params)  # pyright: ignore[reportArgumentType]
    (folder / "README.md").write_text(card.stablehlo_usage(model.inputs) + "\n")


FORMATS: dict[str, Callable[[Exportable, Path], None]] = {
    "flax": _write_flax,
    "timm": _write_timm,
    "transformers": _write_transformers,
    "stablehlo": _write_stablehlo,
}
