"""PatHME on a laptop: a region encoder of width 96, 4 layers, 2 + 2 HMSA layers.

    python -m pathme_jax.train --config configs/pathme_tiny.py --workdir runs/pathme \\
        --config.data.path=OUT/20x-…/regions-… --config.columns.fine=ENC@20x --config.columns.coarse=ENC@5x

Smaller than the paper: width and depth, K = 128 prototypes, 4 local crops, Sinkhorn targets (a batch of
a few dozen regions is too small for a moving centre) at the lower temperatures of dinov2_tiny. The paper's loss weights are not public: 1 each,
KoLeo 0.1.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(variant: str = "") -> Any:
    if variant not in ("", "test"):
        raise ValueError(f"unknown variant {variant!r}; expected nothing or 'test'")
    config: Any = ConfigDict()
    config.method = "pathme_jax.methods.pathme:PatHME"
    config.seed = 0
    config.steps = 60
    config.columns = dict(fine="", coarse="", experts=dict())
    config.batch = dict(samples=16)
    config.model = dict(width=96, depth=4, heads=4, mlp_ratio=4.0, layer_scale=1.0, prompts=10)
    config.hmsa = dict(local_layers=4, global_layers=4, heads=4, dropout=0.1)
    config.head = dict(prototypes=128, hidden=192, bottleneck=64)
    config.views = dict(local_crops=4)
    config.loss = dict(
        dino_global=1.0,
        dino_local=1.0,
        ibot=1.0,
        koleo=0.1,
        mekd=1.0,
        hmsa=1.0,
        targets="sinkhorn",
        teacher_temperature=0.02,
        end_teacher_temperature=0.04,
        temperature_warmup=60,
        drop_path=0.1,
    )
    config.ema = dict(start=0.98, end=1.0)
    config.optimiser = dict(
        lr=5e-4,
        end_lr=1e-6,
        warmup=10,
        weight_decay=0.04,
        end_weight_decay=0.2,
        b1=0.9,
        b2=0.999,
        clip=3.0,
        lr_multipliers=((".*", 1.0),),
        decay_multipliers=(
            (".*(bias|scale_.*|scale|token|position|positions|prompts)", 0.0),
            (".*", 1.0),
        ),
    )
    config.sharding = ((".*", "replicate"),)
    config.data = dict(path="", workers=0)
    config.checkpoint = dict(every=25, keep=2)
    config.log_every = 5
    if variant == "test":
        config.steps = 4
        config.batch.update(samples=4)
        config.model.update(width=32, depth=2, heads=2)
        config.hmsa.update(local_layers=1, global_layers=1, heads=2)
        config.head.update(prototypes=32, hidden=32, bottleneck=16)
        config.views.update(local_crops=2)
        config.checkpoint.update(every=2)
        config.log_every = 1
    return config
