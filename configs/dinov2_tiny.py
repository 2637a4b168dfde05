"""DINOv2 on a laptop: ViT of width 64, 2 layers, patches of 8 px.

    python -m pathme_jax.train --config configs/dinov2_tiny.py --workdir runs/dinov2 --config.data.path=OUT/20x-…

What is smaller than the paper's recipe, and why:
- the model, K = 128 prototypes, 4 local crops, 300,000 times fewer samples;
- crops keep the window's magnification (extended-context translation, Zimmermann 2024) with little blur,
  because chromatin detail is what a pathologist reads;
- the teacher's temperature starts at 0.02 and global crops overlap much: at 0.04-0.07 with little overlap
  so small a model stayed at the uniform assignment (the two were changed together);
- the teacher's momentum starts at 0.98, since a short run's teacher must move;
- tokens and positions do not decay either;
- 256 px tiles are encoded as four parts of the crops' size.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(variant: str = "") -> Any:
    if variant not in ("", "test"):
        raise ValueError(f"unknown variant {variant!r}; expected nothing or 'test'")
    config: Any = ConfigDict()
    config.method = "pathme_jax.methods.dinov2:DINOv2"
    config.seed = 0
    config.steps = 120
    # `block`: samples in a logical block of masks and drop path, whatever the number of devices
    config.batch = dict(samples=32, block=8, window_px=128, mpps=(0.5, 2.0), windows_per_field=2)
    config.model = dict(
        patch=8, width=64, depth=2, heads=1, mlp_ratio=4.0, layer_scale=1.0, registers=0, grid=12
    )
    config.encode = dict(part=128)  # see encoders.zoo.Input
    config.head = dict(prototypes=128, hidden=256, bottleneck=64)
    config.views = dict(
        # shares of the window's area: sides of 86-106 px become 96, 42-53 px become 48
        global_crop=dict(px=96, scale=(0.45, 0.69), aspect=(0.9, 1.11)),
        local_crop=dict(px=48, scale=(0.11, 0.17), aspect=(0.9, 1.11)),
        local_crops=4,
        blur=(0.1, 0.1, 0.1),
        solarize=0.0,
        colour=dict(jitter=(0.3, 0.3, 0.4, 0.1), grey=0.3, sigma=(0.1, 1.0), hed=0.15),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    config.loss = dict(
        dino=1.0,
        ibot=1.0,
        koleo=0.05,
        kde=0.0,
        targets="sinkhorn",
        ibot_head="separate",
        teacher_temperature=0.02,
        end_teacher_temperature=0.04,
        temperature_warmup=120,
        drop_path=0.0,
    )
    config.ema = dict(start=0.98, end=1.0)
    config.optimiser = dict(
        lr=2e-3,
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
    config.mesh = dict(data=-1)
    config.sharding = ((".*", "replicate"),)
    config.initial = dict(into="student/backbone", path="")  # start from a finished run's weights
    config.data = dict(path="", workers=0)
    config.probe = dict(
        every=0, path="", labels="", column="", tiles=8, px=256, multiple=1, split="case", folds=5
    )
    config.profile = dict(first=10, steps=0)
    config.checkpoint = dict(every=25, keep=2)
    config.log_every = 5
    if variant == "test":
        config.steps = 4
        config.batch.update(samples=16, windows_per_field=4)
        config.model.update(width=32, depth=2, heads=2, patch=16, grid=6)
        config.head.update(prototypes=64, hidden=32, bottleneck=16)
        config.views.update(local_crops=2)
        config.checkpoint.update(every=2)
        config.log_every = 1
    return config
