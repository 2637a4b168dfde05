"""Every public pathology patch encoder as one row: the architecture, its input, its output, its terms.

A row is a definition, not weights: those come from their publishers, under their licences, and are
converted once with `python -m pathme_jax.convert`. `python -m pathme_jax.encoders list` prints this table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pathme_jax.errors import UserError
from pathme_jax.models.vit import SIZES

IMAGENET: dict[str, Any] = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Input:
    """How an image becomes the model's input: resize, centre crop, cut into parts, normalise.

    Attributes:
        resize: side in pixels that the shorter side is resized to; 0 leaves images as they are.
        crop: side of the centre crop; 0 crops nothing.
        part: side of the parts it is cut into, whose features are averaged; 0, and images no larger, stay
            whole. A small model learns on small crops, and costs less attention on them.
        resample: "bicubic antialias" or "bilinear antialias", as PIL does it on grey levels.
        mean, std: of RGB in [0, 1].
    """

    resize: int = 224
    crop: int = 224
    part: int = 0
    resample: str = "bicubic antialias"
    mean: tuple[float, ...] = IMAGENET["mean"]
    std: tuple[float, ...] = IMAGENET["std"]


@dataclasses.dataclass(frozen=True)
class Definition:
    """One encoder.

    Attributes:
        name: lower case, digits and hyphens.
        model: fields of `models.vit.ViT`.
        input: what is done to images.
        output: "cls"; "cls+mean", CLS beside the mean of patch tokens; or "pooler".
        pooler: fields of `models.pooler.AttentionalPooler`, where there is one.
        positions: what the released file's positions cover: "patches", "cls+patches" or
            "cls+registers+patches". Here those of CLS and registers are added to the tokens themselves.
        millions: of parameters, as published (a pooler included).
        unused: keys of the released file (regular expressions) that no feature needs.
        mpp: µm/px it was trained at; none for natural images. tile_px: side of the tiles its authors feed
            it, before `input`.
        licence: of the weights. terms: restrictions worth a warning, or "".
        source: where the weights are: a Hugging Face repository or a URL.
    """

    name: str
    model: Mapping[str, Any]
    input: Input
    positions: str
    licence: str
    source: str
    millions: float = 0.0
    output: str = "cls"
    pooler: Mapping[str, Any] | None = None
    unused: tuple[str, ...] = ()
    mpp: tuple[float, ...] = (0.5,)
    tile_px: int = 224
    terms: str = ""

    @property
    def width(self) -> int:
        """Of a feature."""
        if self.pooler is not None:
            return self.pooler["width"]
        return self.model["width"] * (2 if self.output == "cls+mean" else 1)


HALF: dict[str, Any] = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
OPENAI: dict[str, Any] = dict(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)
BIOPTIMUS: dict[str, Any] = dict(
    mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517)
)
LUNIT: dict[str, Any] = dict(
    mean=(0.70322989, 0.53606487, 0.66096631), std=(0.21716536, 0.26081574, 0.20723464)
)
HIBOU: dict[str, Any] = dict(mean=(0.7068, 0.5755, 0.722), std=(0.195, 0.2316, 0.1816))

BICUBIC = Input()
BILINEAR = Input(resample="bilinear antialias")
FULL_CROP = Input(resize=256)

NON_COMMERCIAL = "non-commercial use only"
NO_TRAINING = (
    "non-commercial academic use only, no derivatives; its authors count models trained on its features"
    " among them: ask them before distilling from it"
)
NO_DERIVATIVES = "non-commercial use only, no derivatives"
RESEARCH = "its authors ask for research use only"


def _vit(size: str, patch: int, *, side: int = 224, **more: Any) -> dict[str, Any]:
    """Fields of a ViT of one of DINOv2's sizes, learned on images of `side` pixels."""
    return {
        **dict(layer_scale=1e-5, registers=0, mlp_ratio=4.0),
        **SIZES[size],
        "patch": patch,
        "grid": side // patch,
        **more,
    }


def _hub(size: str, registers: int) -> Definition:
    """Meta's DINOv2: positions learned at 518 px, so at 224 their interpolation is part of it."""
    name = f"dinov2-{size}" + (f"-reg{registers}" if registers else "")
    letter = "g" if size == "giant" else size[0]
    return Definition(
        name,
        _vit(
            size,
            14,
            side=518,
            registers=registers,
            resample="bicubic antialias" if registers else "bicubic offset",
        ),
        FULL_CROP,
        positions="cls+patches",
        millions={"small": 22.06, "base": 86.58, "large": 304.37, "giant": 1136.48}[
            size
        ],  # 4 registers: < 0.01 more
        licence="Apache-2.0",
        source="https://dl.fbaipublicfiles.com/dinov2/"
        f"dinov2_vit{letter}14/dinov2_vit{letter}14{'_reg4' if registers else ''}_pretrain.pth",
        mpp=(),
        tile_px=256,
    )


def _kaiko(name: str, model: dict[str, Any], millions: float, positions: str) -> Definition:
    return Definition(
        name,
        model,
        Input(resample="bilinear antialias", **HALF),
        positions=positions,
        millions=millions,
        licence="Kaiko Non-Commercial Public License",
        source="https://github.com/kaiko-ai/towards_large_pathology_fms/releases/tag/0.0.1",
        mpp=(0.25, 0.5, 1.0, 2.0),
        tile_px=256,
        terms=NON_COMMERCIAL,
    )


def _lunit(name: str, patch: int, how: Input, source: str) -> Definition:
    return Definition(
        name,
        _vit("small", patch, layer_scale=0.0),
        how,
        positions="cls+patches",
        millions=21.67,
        licence="Lunit Inc. Public License",
        source=source,
        mpp=(0.25, 0.5),
        terms=NON_COMMERCIAL,
    )


LUNIT_RELEASE = (
    "https://github.com/lunit-io/benchmark-ssl-pathology/releases/tag/pretrained-weights"
)
CONCH_UNUSED = (
    r"(module\.)?text(_decoder)?\..*",
    r"(module\.)?logit_scale",
    r"(module\.)?visual\.attn_pool_caption\..*",
    r"(module\.)?visual\.ln_caption\..*",
    # Projects into the space shared with text; features for slides are taken before it.
    r"(module\.)?visual\.proj_contrast",
)

ROWS = (
    Definition(
        "uni",
        _vit("large", 16),
        BILINEAR,
        positions="cls+patches",
        millions=303.35,
        licence="CC-BY-NC-ND-4.0",
        source="MahmoodLab/UNI",
        tile_px=256,
        terms=NO_TRAINING,
    ),
    Definition(
        "uni2-h",
        _vit("giant", 14, depth=24, registers=8),
        BILINEAR,
        positions="patches",
        millions=681.39,
        licence="CC-BY-NC-ND-4.0",
        source="MahmoodLab/UNI2-h",
        tile_px=256,
        terms=NO_TRAINING,
    ),
    Definition(
        "virchow",
        _vit("huge", 14, ffn="swiglu", mlp_ratio=5.3375 * 3 / 4),
        BICUBIC,
        positions="cls+patches",
        millions=631.23,
        licence="Apache-2.0",
        source="paige-ai/Virchow",
        output="cls+mean",
        terms=RESEARCH,
    ),
    Definition(
        "virchow2",
        _vit("huge", 14, ffn="swiglu", mlp_ratio=5.3375 * 3 / 4, registers=4),
        BICUBIC,
        positions="cls+registers+patches",
        millions=631.24,
        licence="CC-BY-NC-ND-4.0",
        source="paige-ai/Virchow2",
        output="cls+mean",
        mpp=(0.25, 0.5, 1.0, 2.0),
        terms=NO_TRAINING,
    ),
    Definition(
        "gigapath",
        _vit("giant", 16),
        FULL_CROP,
        positions="cls+patches",
        millions=1134.95,
        licence="Apache-2.0",
        source="prov-gigapath/prov-gigapath",
        tile_px=256,
        terms=RESEARCH,
    ),
    Definition(
        "gigapath-flash",
        _vit("small", 16, ffn="swiglu"),
        FULL_CROP,
        positions="cls+patches",
        millions=21.68,
        licence="Apache-2.0",
        source="prov-gigapath/prov-gigapath-flash",
        tile_px=256,
        terms=RESEARCH,
    ),
    Definition(
        "h-optimus-0",
        _vit("giant", 14, registers=4),
        Input(resample="bilinear antialias", **BIOPTIMUS),
        positions="patches",
        millions=1134.77,
        licence="Apache-2.0",
        source="bioptimus/H-optimus-0",
    ),
    Definition(
        "h-optimus-1",
        _vit("giant", 14, registers=4),
        Input(resample="bilinear antialias", **BIOPTIMUS),
        positions="patches",
        millions=1134.77,
        licence="CC-BY-NC-ND-4.0",
        source="bioptimus/H-optimus-1",
        terms=NO_DERIVATIVES,
    ),
    Definition(
        "h0-mini",
        _vit("base", 14, ffn="swiglu", registers=4),
        Input(**BIOPTIMUS),
        positions="patches",
        millions=85.74,
        licence="CC-BY-NC-ND-4.0",
        source="bioptimus/H0-mini",
        terms=NO_DERIVATIVES,
    ),
    Definition(
        "gpfm",
        _vit("large", 14),
        BICUBIC,
        positions="cls+patches",
        millions=303.23,
        licence="unclear (CC-BY-NC-4.0 or MIT)",
        source="majiabo/GPFM",
        unused=(r".*dino_head\..*", r".*ibot_head\..*"),
        mpp=(0.25,),
        tile_px=512,
        terms="distilled from UNI, CONCH and Phikon, all of which restrict use",
    ),
    # kaiko's small and base models have no LayerScale.
    _kaiko("kaiko-s8", _vit("small", 8, layer_scale=0.0), 21.67, "cls+patches"),
    _kaiko("kaiko-s16", _vit("small", 16, layer_scale=0.0), 21.67, "cls+patches"),
    _kaiko("kaiko-b8", _vit("base", 8, layer_scale=0.0), 85.81, "cls+patches"),
    _kaiko("kaiko-b16", _vit("base", 16, layer_scale=0.0), 85.80, "cls+patches"),
    # Learned at 518 px and run at 224: its positions are always interpolated.
    _kaiko("kaiko-l14", _vit("large", 14, side=518, registers=4), 304.37, "patches"),
    _lunit("lunit-s8", 8, Input(resample="bilinear antialias", **LUNIT), LUNIT_RELEASE),
    _lunit("lunit-s16", 16, Input(resample="bilinear antialias", **LUNIT), LUNIT_RELEASE),
    # The same weights as timm's port declares them, which TRIDENT follows: other features.
    _lunit("lunit-s8-timm", 8, Input(resize=248), "1aurent/vit_small_patch8_224.lunit_dino"),
    _lunit("lunit-s16-timm", 16, Input(resize=248), "1aurent/vit_small_patch16_224.lunit_dino"),
    Definition(
        "conch",
        _vit("base", 16, side=448, layer_scale=0.0),
        Input(resize=448, crop=448, **OPENAI),
        positions="cls+patches",
        millions=87.57,
        licence="CC-BY-NC-ND-4.0",
        source="MahmoodLab/CONCH",
        output="pooler",
        pooler=dict(width=512, heads=8),
        unused=CONCH_UNUSED,
        tile_px=512,
        terms=NO_TRAINING,
    ),
    Definition(
        "conch-v1.5",
        # Its positions were stored at 224 px and are interpolated with DINO's offset at 448.
        _vit("large", 16, resample="bicubic offset"),
        Input(resize=448, crop=448, resample="bilinear antialias"),
        positions="cls+patches",
        millions=306.11,
        licence="CC-BY-NC-ND-4.0",
        source="MahmoodLab/conchv1_5",
        output="pooler",
        pooler=dict(width=768, heads=8, use_bias=False),
        tile_px=512,
        terms=NO_TRAINING,
    ),
    Definition(
        "phikon",
        _vit("base", 16, layer_scale=0.0, resample="bicubic"),
        BILINEAR,
        positions="cls+patches",
        millions=85.80,
        licence="Owkin non-commercial licence",
        source="owkin/phikon",
        unused=(r"(vit\.)?pooler\..*",),
        terms=NON_COMMERCIAL,
    ),
    Definition(
        "phikon-v2",
        _vit("large", 16, resample="bicubic"),
        BICUBIC,
        positions="cls+patches",
        millions=303.35,
        licence="Owkin non-commercial licence",
        source="owkin/phikon-v2",
        terms=NON_COMMERCIAL,
    ),
    # Away from 224 px Hibou's rule is not known for certain: this is transformers' for its class.
    Definition(
        "hibou-b",
        _vit("base", 14, ffn="swiglu", registers=4),
        Input(**HIBOU),
        positions="cls+patches",
        millions=85.74,
        licence="Apache-2.0",
        source="histai/hibou-b",
    ),
    Definition(
        "hibou-l",
        _vit("large", 14, ffn="swiglu", registers=4),
        Input(**HIBOU),
        positions="cls+patches",
        millions=303.66,
        licence="Apache-2.0",
        source="histai/hibou-L",
    ),
    Definition(
        "midnight",
        # Positions learned at 518 px: at 224 the rule of transformers' Dinov2Model is part of it.
        _vit("giant", 14, side=518, resample="bicubic"),
        Input(resample="bilinear antialias", **HALF),
        positions="cls+patches",
        millions=1136.48,
        licence="MIT",
        source="kaiko-ai/midnight",
        output="cls+mean",
        mpp=(0.25, 0.5, 1.0, 2.0),
    ),
    Definition(
        "openmidnight",
        _vit("giant", 14, registers=4),
        BILINEAR,
        positions="cls+patches",
        millions=1134.78,
        licence="Apache-2.0",
        source="SophontAI/OpenMidnight",
        mpp=(0.25, 0.5, 1.0, 2.0),
    ),
    *(
        _hub(size, registers)
        for size in ("small", "base", "large", "giant")
        for registers in (0, 4)
    ),
)
ENCODERS: dict[str, Definition] = {row.name: row for row in ROWS}


# What TRIDENT calls them, in the names of its feature folders.
TRIDENT = {
    "uni_v1": "uni",
    "uni_v2": "uni2-h",
    "conch_v1": "conch",
    "conch_v15": "conch-v1.5",
    "hoptimus0": "h-optimus-0",
    "hoptimus1": "h-optimus-1",
    "phikon_v2": "phikon-v2",
    "hibou_l": "hibou-l",
    "kaiko-vits8": "kaiko-s8",
    "kaiko-vits16": "kaiko-s16",
    "kaiko-vitb8": "kaiko-b8",
    "kaiko-vitb16": "kaiko-b16",
    "kaiko-vitl14": "kaiko-l14",
    "lunit-vits8": "lunit-s8-timm",
    "midnight12k": "midnight",
}


def find(name: str) -> Definition:
    """Raises UserError where the table has no such row."""
    if name not in ENCODERS:
        raise UserError(f"no encoder {name!r}", f"Expected one of {', '.join(ENCODERS)}")
    return ENCODERS[name]


def terms_of(name: str) -> dict[str, str]:
    """Licence, terms and source of the public encoder that a converted one, `<row>-<hash8>`, came from, or that
    TRIDENT calls so; empty for others."""
    names = (name.rpartition("-")[0], name, TRIDENT.get(name, ""))
    row = next((ENCODERS[each] for each in names if each in ENCODERS), None)
    if row is None:
        return {}
    return {"licence": row.licence, "terms": row.terms, "source": row.source}


def table() -> str:
    """A line an encoder: name, millions of parameters, width of a feature, input, µm/px, licence."""
    head = ("name", "params", "width", "output", "input", "µm/px", "licence", "restricted")
    rows = [
        (
            row.name,
            f"{row.millions:.1f} M",
            str(row.width),
            row.output,
            f"{row.input.crop} px",
            " ".join(f"{mpp:g}" for mpp in row.mpp) or "any",
            row.licence,
            "yes" if row.terms else "",
        )
        for row in ROWS
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in (head, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def describe(row: Definition) -> str:
    """All that is known of an encoder, and the commands that get it."""
    how = row.input
    steps = [f"resize the shorter side to {how.resize} px ({how.resample})"] if how.resize else []
    steps += [f"centre crop {how.crop} px"] if how.crop else []
    steps += [f"parts of {how.part} px"] if how.part else []
    model = ", ".join(f"{key}={value}" for key, value in row.model.items())
    lines = {
        "parameters": f"{row.millions:.2f} million",
        "model": model,
        "pooler": ", ".join(f"{k}={v}" for k, v in row.pooler.items()) if row.pooler else "",
        "input": "; ".join([*steps, f"mean {how.mean}, std {how.std}"]),
        "output": f"{row.output}, {row.width} wide",
        "trained at": " ".join(f"{mpp:g}" for mpp in row.mpp) + " µm/px" if row.mpp else "",
        "tiles": f"{row.tile_px} px",
        "licence": row.licence,
        "terms": row.terms,
        "weights": row.source,
        "convert": f"python -m pathme_jax.convert --encoder {row.name} --weights FILE --out encoders/{row.name}",
        "extract": f"python -m pathme_jax.extract --encoder encoders/{row.name} --slides SLIDES --out OUT",
        "go on training": f"python -m pathme_jax.train --config configs/dinov2.py:{row.name}"
        f" --config.initial.path=encoders/{row.name} …",
    }
    return row.name + "".join(f"\n  {key:15s} {value}" for key, value in lines.items() if value)
