"""DINOv2 at patch level: multi-crop DINO + iBOT + KoLeo with an EMA teacher (Oquab 2023; METHODS 1.2).

The student sees masked global crops and unmasked local ones, the teacher unmasked global crops only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.errors import UserError
from pathme_jax.losses import self_distillation as ssl
from pathme_jax.models.heads import PrototypeHead
from pathme_jax.models.transformer import drop_path_factors
from pathme_jax.models.vit import ViT
from pathme_jax.training.contract import TRAINED, BatchSpec, Config, EmaOf, Params, Rules
from pathme_jax.training.keys import substream, substreams
from pathme_jax.training.schedules import cosine, linear
from pathme_jax.views.images import Crop, crops, normalise
from pathme_jax.views.masks import block_masks, mask_counts

Array = jax.Array
MASK_BLOCK = 8  # samples in a logical block of masks


class DINOv2:
    """Config: batch, model, head, views, loss, steps (see configs/dinov2_tiny.py)."""

    def __init__(self, config: Config):
        if config.loss.targets not in ssl.ASSIGNMENTS:
            raise UserError(
                f"config.loss.targets = {config.loss.targets!r}",
                f"Expected one of {', '.join(ssl.ASSIGNMENTS)}",
            )
        self.config = config
        self.batch_spec = BatchSpec(
            record="fields",
            samples=config.batch.samples,
            window_px=config.batch.window_px,
            mpps=tuple(config.batch.mpps),
            windows_per_field=config.batch.windows_per_field,
        )
        self.backbone: Any = ViT(**config.model)
        self.head: Any = PrototypeHead(**config.head)
        colour = dict(config.views.colour)
        self.crop_kinds = [
            Crop(**config.views.global_crop, **colour, blur=config.views.blur[0]),
            Crop(
                **config.views.global_crop,
                **colour,
                blur=config.views.blur[1],
                solarize=config.views.solarize,
            ),
            Crop(**config.views.local_crop, **colour, blur=config.views.blur[2]),
        ]
        side = config.views.global_crop.px // config.model.patch
        self.mask_grid = (side, side)
        self.counts = mask_counts(
            2 * config.batch.samples, side * side, (0.1, 0.5), 0.5, 2 * MASK_BLOCK
        )
        self.momentum = cosine(config.ema.start, config.ema.end, config.steps)
        self.teacher_temperature = linear(
            config.loss.teacher_temperature,
            config.loss.end_teacher_temperature,
            config.loss.temperature_warmup,
        )

    def init(self, key: Array, shapes: Mapping[str, Any]) -> tuple[Params, dict[str, Array]]:
        one, two, three = jax.random.split(key, 3)
        side = self.config.views.global_crop.px
        image = jnp.zeros((1, side, side, 3))
        backbone = self.backbone.init(one, image, jnp.zeros((1, self.mask_grid[0] ** 2), bool))
        feature = jnp.zeros((1, self.config.model.width))
        student = {
            "backbone": backbone["params"],
            "dino": self.head.init(two, feature)["params"],
            "ibot": self.head.init(three, feature)["params"],
        }
        centre = jnp.zeros((self.config.head.prototypes,))
        return {"student": student, "teacher": student}, {"dino": centre, "ibot": centre}

    @property
    def roles(self) -> Rules:
        return [("student/.*", TRAINED), ("teacher/(.*)", EmaOf(r"student/\1", self.momentum))]

    def views(self, batch: Mapping[str, Array], keys: Array) -> dict[str, Array]:
        """ "globals" (2, b, g, g, 3), "locals" (l, b, s, s, 3), "mask" (2, b, n) bool."""
        images = [crops(batch["window"], substream(keys, i), self.crop_kinds[i]) for i in (0, 1)]
        small = jax.vmap(lambda keys: crops(batch["window"], keys, self.crop_kinds[2]))(
            substreams(substream(keys, 2), self.config.views.local_crops)
        )
        counts = self.counts.reshape(-1, 2)  # the two globals of a sample are neighbours in a block
        masks = [block_masks(substream(keys, 3 + i), counts[:, i], self.mask_grid) for i in (0, 1)]
        scale = (tuple(self.config.views.mean), tuple(self.config.views.std))
        return {
            "globals": normalise(jnp.stack(images), *scale),
            "locals": normalise(small, *scale),
            "mask": jnp.stack(masks).reshape(2, len(keys), -1),
        }

    def loss(
        self, params: Params, aux: dict[str, Array], views: Any, keys: Array, step: Array
    ) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
        c = self.config.loss
        b = views["globals"].shape[1]
        both = views["globals"].reshape(2 * b, *views["globals"].shape[2:])
        mask = views["mask"].reshape(2 * b, -1)
        student, teacher = params["student"], jax.lax.stop_gradient(params["teacher"])

        def run(
            weights: Params, images: Array, mask: Array | None = None, keys: Array | None = None
        ) -> dict[str, Array]:
            depth = self.config.model.depth
            keep = None if keys is None else drop_path_factors(keys, depth, c.drop_path)
            return self.backbone.apply({"params": weights["backbone"]}, images, mask, keep)

        def project(weights: Params, name: str, x: Array) -> Array:
            return self.head.apply({"params": weights[name]}, x)

        seen = run(student, both, mask, substreams(substream(keys, 0), 2).reshape(-1))
        known = jax.lax.stop_gradient(run(teacher, both))
        n_local = len(views["locals"])
        near = views["locals"].reshape(n_local * b, *views["locals"].shape[2:])
        near_keys = substreams(substream(keys, 1), n_local).reshape(-1)
        local_cls = run(student, near, None, near_keys)["cls"]

        # DINO: masked student CLS, and local CLS, against the other view's unmasked teacher CLS.
        temperature = self.teacher_temperature(step)
        logits = project(teacher, "dino", known["cls"])
        target = ssl.assign(c.targets, logits, aux["dino"], temperature, jnp.ones(2 * b))
        target = target.reshape(2, b, -1)
        own = project(student, "dino", seen["cls"]).reshape(2, b, -1)
        local = project(student, "dino", local_cls).reshape(n_local, 1, b, target.shape[-1])
        terms = 2 + 2 * n_local
        global_dino: Any = (
            sum(ssl.cross_entropy(own[i], target[1 - i]).mean() for i in (0, 1)) / terms
        )
        local_dino = ssl.cross_entropy(local, target).mean(-1).sum() / terms

        # iBOT: every masked patch against the teacher's patch; a masked image's weights sum to 1, and
        # the mean is over all images, as in DINOv2's code.
        total = int(self.counts.sum())
        at = jnp.nonzero(mask.reshape(-1), size=total)[0]
        weight = 1.0 / mask.sum(1)[at // mask.shape[1]]
        hidden = project(student, "ibot", seen["tokens"].reshape(-1, seen["tokens"].shape[-1])[at])
        truth = project(teacher, "ibot", known["tokens"].reshape(-1, known["tokens"].shape[-1])[at])
        patch_target = ssl.assign(c.targets, truth, aux["ibot"], temperature, jnp.ones(total))
        ibot = (ssl.cross_entropy(hidden, patch_target) * weight).sum() / (2 * b)

        koleo: Any = sum(ssl.koleo(x) for x in seen["cls"].reshape(2, b, -1))
        loss = c.dino * (global_dino + local_dino) + c.ibot * ibot + c.koleo * koleo
        metrics = {
            "loss/dino_global": global_dino,
            "loss/dino_local": local_dino,
            "loss/ibot": ibot,
            "loss/koleo": koleo,
            "teacher_entropy": ssl.entropy(target),
            "prototype_usage": ssl.usage(target, jnp.ones((2, b))),
            "feature_std": (known["cls"] / jnp.linalg.norm(known["cls"], axis=-1, keepdims=True))
            .std(0)
            .mean()
            * np.sqrt(self.config.model.width),
            "ema_momentum": self.momentum(step),
        }
        aux = {
            "dino": ssl.moved_centre(aux["dino"], logits, jnp.ones(2 * b)),
            "ibot": ssl.moved_centre(aux["ibot"], truth, jnp.ones(total)),
        }
        return loss, (metrics, aux)

    def product(self, params: Params) -> Params:
        return params["teacher"]["backbone"]

    def encode(self, product: Params, batch: Mapping[str, Array]) -> Array:
        """(b, h, w, 3) uint8 to (b, d): the CLS token, averaged over parts of `encode_px` pixels.

        A small model learns on small crops; parts of that size keep it where it was trained, and cost
        less attention than the whole image. Smaller images, and all with encode_px = 0, are encoded whole.
        """
        images = batch["image"]
        b, side = images.shape[:2]
        px = min(self.config.encode_px or side, side)
        if side % px or images.shape[2] != side:
            raise UserError(
                f"images of {side}x{images.shape[2]} px do not divide into parts of {px} px",
                "Change config.encode_px",
            )
        parts = images.reshape(b, side // px, px, side // px, px, 3).swapaxes(2, 3)
        parts = parts.reshape(-1, px, px, 3).astype(jnp.float32) / 255
        parts = normalise(parts, tuple(self.config.views.mean), tuple(self.config.views.std))
        cls = self.backbone.apply({"params": product}, parts)["cls"]
        return cls.reshape(b, -1, cls.shape[-1]).mean(1)
