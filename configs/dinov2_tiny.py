"""DINOv2 on a laptop: ViT of width 96, 4 layers, patches of 16 px.

    python -m pathme_jax.train --config configs/dinov2_tiny.py --workdir runs/dinov2 --config.data.path=OUT/20x-…

What is smaller than the paper's recipe: the model, K = 512 prototypes, 4 local crops, momentum from 0.98
(a short run's teacher must move), crops that keep the window's magnification (extended-context
translation, Zimmermann 2024) and little blur, because chromatin detail is what a pathologist reads.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(variant: str = "") -> Any:
    if variant not in ("", "test"):
        raise ValueError(f"unknown variant {variant!r}; expected nothing or 'test'")
    config: Any = ConfigDict()
    config.method = "pathme_jax.methods.dinov2:DINOv2"
    config.seed = 0
    config.steps = 150
    config.batch = dict(samples=48, window_px=256, mpps=(0.5, 2.0), windows_per_field=2)
    config.model = dict(
        patch=16, width=96, depth=4, heads=4, mlp_ratio=4.0, layer_scale=1.0, registers=0, grid=8
    )
    config.head = dict(prototypes=512, hidden=256, bottleneck=64)
    config.views = dict(
        # areas relative to the window: sides of 102–179 px become 128, 51–81 px become 64
        global_crop=dict(px=128, scale=(0.16, 0.45), aspect=(0.9, 1.11)),
        local_crop=dict(px=64, scale=(0.04, 0.1), aspect=(0.9, 1.11)),
        local_crops=4,
        blur=(0.1, 0.1, 0.1),
        solarize=0.0,
        colour=dict(jitter=(0.3, 0.3, 0.2, 0.05), grey=0.1, sigma=(0.1, 1.0), hed=0.1),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    config.loss = dict(
        dino=1.0,
        ibot=1.0,
        koleo=0.1,
        targets="sinkhorn",
        teacher_temperature=0.04,
        end_teacher_temperature=0.07,
        temperature_warmup=50,
        drop_path=0.0,
    )
    config.ema = dict(start=0.98, end=1.0)
    config.optimiser = dict(
        lr=1e-3,
        end_lr=1e-5,
        warmup=15,
        weight_decay=0.04,
        end_weight_decay=0.2,
        b1=0.9,
        b2=0.999,
        clip=3.0,
        lr_multipliers=(("student/backbone/patch_embed/.*", 0.5), (".*", 1.0)),
        decay_multipliers=((".*(bias|scale_.*|scale|token|positions)", 0.0), (".*", 1.0)),
    )
    config.sharding = ((".*", "replicate"),)
    config.data = dict(path="", workers=0)
    config.checkpoint = dict(every=25, keep=2)
    config.log_every = 5
    if variant == "test":
        config.steps = 4
        config.batch.samples = 16
        config.batch.windows_per_field = 4
        config.model.update(width=32, depth=2, heads=2)
        config.head.update(prototypes=64, hidden=32, bottleneck=16)
        config.views.local_crops = 2
        config.checkpoint.every = 2
        config.log_every = 1
    return config
