"""DINOv2 as published (Oquab 2023; Darcet 2024 for registers), on fields of whole slides.

    python -m pathme_jax.train --config configs/dinov2.py:L/16 --workdir runs/vitl16 --config.data.path=OUT/20x-…

Variants: S/16 B/16 L/16 H/14 g/14, or an encoder of `python -m pathme_jax.encoders list`, to go on from its
converted weights: `--config configs/dinov2.py:uni --config.initial.path=DIR`. Try it without a GPU first: `--dry-run --devices 8` prints every
parameter with its role, rates and place, FLOPs, memory and communication.

Values are those of the paper's ViT-L (125,000 steps of 2,048 images) and, for g/14, of its giant, but for:
- vertical flips and quarter turns as well, HED jitter, no solarisation (tissue has no up, and stain varies);
- windows of 256 px at 0.5, 1 and 2 µm/px, so that a global crop's magnification is its window's where its
  scale is near (224 / 256)^2 = 0.77; `views.images.translation` gives crops that never zoom (Virchow2's ECT);
- registers (4), which cost nothing and keep patch tokens clean.

Choices worth trying by hand: `--config.loss.koleo=0 --config.loss.kde=0.05` (Virchow2: survives duplicates),
`--config.loss.ibot_head=shared`, `--config.model.remat=full` (less memory, more time),
`--config.model.attention=cudnn`, `--config.mesh.fsdp=8`.
"""

from typing import Any

from ml_collections import ConfigDict

from pathme_jax.encoders.zoo import ENCODERS, Input
from pathme_jax.models.vit import SIZES

NAMES = {"S": "small", "B": "base", "L": "large", "H": "huge", "g": "giant"}


def get_config(variant: str = "L/16") -> Any:
    model, how = _architecture(variant)
    giant, patch = model["width"] >= 1536, model["patch"]
    config: Any = ConfigDict()
    config.method = "pathme_jax.methods.dinov2:DINOv2"
    config.seed = 0
    epoch = 1250  # steps
    config.steps = (500 if giant else 100) * epoch
    # `block`: samples in a logical block of masks and drop path, whatever the number of devices
    config.batch = dict(
        samples=2048, block=8, window_px=256, mpps=(0.5, 1.0, 2.0), windows_per_field=4
    )
    config.model = dict(
        **model,
        # From L on, what a layer computed between its products would take most of a GPU's memory.
        remat="none" if model["width"] <= 768 else "dots",
        unroll=1,
        attention="xla",
        dtype="bfloat16",
    )
    # How a tile becomes what is encoded, see encoders.zoo.Input.
    config.encode = dict(resize=how.resize, crop=how.crop, resample=how.resample)
    config.head = dict(
        prototypes=131_072 if giant else 65_536,
        hidden=2048,
        bottleneck=384 if giant else 256,
        dtype="bfloat16",
    )
    config.views = dict(
        global_crop=dict(px=224, scale=(0.32, 1.0)),
        local_crop=dict(px=98 if patch == 14 else 96, scale=(0.05, 0.32)),
        local_crops=8,
        blur=(1.0, 0.1, 0.5),
        solarize=0.0,
        colour=dict(jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, hed=0.05),
        mean=how.mean,
        std=how.std,
    )
    config.loss = dict(
        dino=1.0,
        ibot=1.0,
        koleo=0.1,
        kde=0.0,
        targets="sinkhorn" if giant else "centring",
        ibot_head="separate" if giant else "shared",
        teacher_temperature=0.04,
        end_teacher_temperature=0.07,
        temperature_warmup=30 * epoch,
        drop_path=0.4 if giant else 0.3,
    )
    config.ema = dict(start=0.994 if giant else 0.992, end=1.0)
    config.optimiser = dict(
        lr=2e-4 if giant else 4e-3,
        lr_samples=1024,  # that rate is for so many samples; it grows with the batch's square root
        end_lr=1e-6,
        warmup=(80 if giant else 10) * epoch,
        weight_decay=0.04,
        end_weight_decay=0.2 if giant else 0.4,
        b1=0.9,
        b2=0.999,
        clip=3.0,
        layer_decay=1.0 if giant else 0.9,
        layers=(
            ("student/backbone/(patch_embed/.*|cls_token|positions|mask_token|registers)", "first"),
            ("student/backbone/blocks/.*", "each"),
            (".*", "last"),
        ),
        lr_multipliers=(("student/backbone/patch_embed/.*", 0.2), (".*", 1.0)),
        decay_multipliers=((".*(bias|scale_.*|scale)", 0.0), (".*", 1.0)),
        frozen_until=((".*/prototypes", epoch), (".*", 0)),
    )
    config.mesh = dict(data=-1, fsdp=1, prototypes=1)
    # Vectors stay whole: gathering them would cost more than they take.
    config.sharding = (
        (".*/prototypes", "prototypes"),
        (".*(bias|scale|scale_.*|token|registers)", "replicate"),
        (".*", "fsdp"),
    )
    config.initial = dict(into="student/backbone", path="")  # start from a finished run's weights
    config.data = dict(path="", workers=16)
    config.probe = dict(
        every=0,
        path="",
        labels="",
        column="",
        tiles=16,
        px=224,
        multiple=1,
        split="case",
        folds=5,
    )
    config.profile = dict(first=10, steps=0)
    config.checkpoint = dict(every=epoch, keep=3)
    config.log_every = 10
    return config


def _architecture(variant: str) -> tuple[dict[str, Any], Input]:
    """Fields of the ViT, and what it expects of images."""
    if variant in ENCODERS:
        return dict(ENCODERS[variant].model), ENCODERS[variant].input
    size, _, patch = variant.partition("/")
    if size not in NAMES or patch not in ("8", "14", "16"):
        raise ValueError(
            f"unknown variant {variant!r}; expected one of S B L H g, a slash and 8, 14 or 16; or an"
            f" encoder: {', '.join(ENCODERS)}"
        )
    rest: dict[str, Any] = dict(mlp_ratio=4.0, layer_scale=1e-5, registers=4)
    model = {**SIZES[NAMES[size]], "patch": int(patch), **rest, "grid": 224 // int(patch)}
    return model, Input()
