"""DINOv2 at patch level: multi-crop DINO + iBOT + KoLeo with an EMA teacher (Oquab 2023; METHODS 1.2).

The student sees masked global crops and unmasked local ones, the teacher unmasked global crops only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathme_jax.encoders import patch
from pathme_jax.encoders.zoo import Definition, Input
from pathme_jax.errors import UserError
from pathme_jax.losses import self_distillation as ssl
from pathme_jax.models.heads import PrototypeHead
from pathme_jax.models.transformer import REMAT, drop_path_rows, take_rows
from pathme_jax.models.vit import ViT
from pathme_jax.training.contract import TRAINED, BatchSpec, Config, EmaOf, Params, Rules
from pathme_jax.training.keys import substream
from pathme_jax.training.schedules import cosine, linear
from pathme_jax.training.sharding import spread
from pathme_jax.views import masks
from pathme_jax.views.images import Crop, many, normalise

Array = jax.Array
IBOT_HEADS = ("separate", "shared")
RUNNING = ("remat", "unroll", "attention", "dtype")  # of a model: how it is computed, not what


class DINOv2:
    """Config: batch, model, head, views, loss, ema, steps (see configs/dinov2.py)."""

    def __init__(self, config: Config):
        _one_of("config.loss.targets", config.loss.targets, ssl.ASSIGNMENTS)
        _one_of("config.loss.ibot_head", config.loss.ibot_head, IBOT_HEADS)
        model = config.model
        _one_of("config.model.remat", model.get("remat", "none"), tuple(REMAT))
        _one_of("config.model.ffn", model.get("ffn", "mlp"), ("mlp", "swiglu"))
        _one_of("config.model.attention", model.get("attention", "xla"), ("xla", "cudnn"))
        for part in (model, config.head):
            _one_of("dtype", part.get("dtype", "float32"), ("float32", "bfloat16"))
        for wrong, said in (
            (
                model.width % model.heads,
                f"config.model.width = {model.width} is no multiple of heads",
            ),
            (config.head.prototypes < 2, f"config.head.prototypes = {config.head.prototypes}"),
            (
                not 0 <= config.loss.drop_path < 1,
                f"config.loss.drop_path = {config.loss.drop_path}",
            ),
            (config.batch.samples < 2, f"config.batch.samples = {config.batch.samples}"),
        ):
            if wrong:
                raise UserError(
                    said,
                    "Expected heads that divide the width, 2 or more prototypes and samples, a rate below 1",
                )
        self.config = config
        self.batch_spec = BatchSpec(
            record="fields",
            samples=config.batch.samples,
            window_px=config.batch.window_px,
            mpps=tuple(config.batch.mpps),
            windows_per_field=config.batch.windows_per_field,
        )
        if config.batch.samples % config.batch.block:
            raise UserError(
                f"config.batch.samples = {config.batch.samples} is no multiple of"
                f" config.batch.block = {config.batch.block}",
                "Masks and drop path are drawn in blocks of so many samples",
            )
        for name in ("global_crop", "local_crop"):
            px = config.views[name].px
            if px % config.model.patch:
                raise UserError(
                    f"config.views.{name}.px = {px} does not divide into patches of"
                    f" {config.model.patch} px",
                    "Change one of the two",
                )
        self.backbone: Any = ViT(**config.model)
        self.head: Any = PrototypeHead(**config.head)
        # The patch tokens' head: DINO's own, or another of the same form.
        self.ibot = "dino" if config.loss.ibot_head == "shared" else "ibot"
        colour, blur = dict(config.views.colour), config.views.blur
        self.crop_kinds = {
            "global_1": Crop(**config.views.global_crop, **colour, blur=blur[0]),
            "global_2": Crop(
                **config.views.global_crop, **colour, blur=blur[1], solarize=config.views.solarize
            ),
            "local": Crop(**config.views.local_crop, **colour, blur=blur[2]),
        }
        side = config.views.global_crop.px // config.model.patch
        self.masks = masks.MaskPlan(shape=(side, side), block=config.batch.block)
        self.momentum = cosine(config.ema.start, config.ema.end, config.steps)
        self.teacher_temperature = linear(
            config.loss.teacher_temperature,
            config.loss.end_teacher_temperature,
            config.loss.temperature_warmup,
        )

    def init(self, key: Array, shapes: Mapping[str, Any]) -> tuple[Params, dict[str, Array]]:
        one, two, three = jax.random.split(key, 3)
        side = self.config.views.global_crop.px
        mask = jnp.zeros((1, math.prod(self.masks.shape)), bool)
        feature = jnp.zeros((1, self.config.model.width))
        student = {
            "backbone": self.backbone.init(one, jnp.zeros((1, side, side, 3)), mask)["params"],
            "dino": self.head.init(two, feature)["params"],
            self.ibot: self.head.init(three, feature)["params"],
        }
        centre = jnp.zeros((self.config.head.prototypes,))
        return {"student": student, "teacher": student}, {"dino": centre, "ibot": centre}

    @property
    def roles(self) -> Rules:
        return [("student/.*", TRAINED), ("teacher/(.*)", EmaOf(r"student/\1", self.momentum))]

    def views(self, batch: Mapping[str, Array], keys: Array) -> dict[str, Array]:
        """ "globals" (b, 2, g, g, 3), "locals" (b, l, s, s, 3), "mask" (b, 2, n) bool."""
        windows, kinds = batch["window"], self.crop_kinds
        pair = [
            many(windows, substream(keys, i), kinds[f"global_{i + 1}"], count=1) for i in (0, 1)
        ]
        small = many(windows, substream(keys, 2), kinds["local"], self.config.views.local_crops)
        scale = (tuple(self.config.views.mean), tuple(self.config.views.std))
        return {
            "globals": normalise(jnp.concatenate(pair, 1), *scale),
            "locals": normalise(small, *scale),
            "mask": masks.draw(self.masks, substream(keys, 3)),
        }

    def pictures(self, views: Mapping[str, Array]) -> dict[str, Array]:
        """A few crops as the student sees them, in [0, 1]; masked patches are grey."""
        mean, std = jnp.array(self.config.views.mean), jnp.array(self.config.views.std)
        whole, small = (jnp.clip(views[k] * std + mean, 0, 1) for k in ("globals", "locals"))
        hidden = views["mask"].reshape(-1, 2, *self.masks.shape)
        hidden = hidden.repeat(self.config.model.patch, 2).repeat(self.config.model.patch, 3)
        return {
            "global 1": jnp.where(hidden[:, 0, ..., None], 0.5, whole[:, 0]),
            "global 2": jnp.where(hidden[:, 1, ..., None], 0.5, whole[:, 1]),
            "local": small[:, 0],
        }

    def loss(
        self, params: Params, aux: dict[str, Array], views: Any, keys: Array, step: Array
    ) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
        c = self.config.loss
        student, teacher = params["student"], jax.lax.stop_gradient(params["teacher"])
        b, crops = len(views["globals"]), views["locals"].shape[1]
        whole, small = _rows(views["globals"]), _rows(views["locals"])
        mask = _rows(views["mask"])

        def project(weights: Params, name: str, x: Array) -> Array:
            return spread(self.head.apply({"params": weights[name]}, x))

        # The student sees masked globals and all locals, the teacher whole globals only.
        groups: list[Any] = [(whole, mask, self._kept(substream(keys, 0), 2))]
        if crops:
            groups.append((small, None, self._kept(substream(keys, 1), crops)))
        seen, *near = self.backbone.apply({"params": student["backbone"]}, groups, method="groups")
        known = jax.lax.stop_gradient(self.backbone.apply({"params": teacher["backbone"]}, whole))

        # DINO: each student view against each whole view of the teacher but its own.
        temperature = self.teacher_temperature(step)
        logits = project(teacher, "dino", known["cls"])
        target = ssl.assign(c.targets, logits, aux["dino"], temperature, jnp.ones(2 * b))
        target = target.reshape(b, 2, -1)
        own = project(student, "dino", seen["cls"]).reshape(b, 2, -1)
        terms = 2 + 2 * crops
        global_dino = ssl.cross_entropy(own, target[:, ::-1]).mean(0).sum() / terms
        local_dino = jnp.zeros(())
        if crops:
            local = project(student, "dino", near[0]["cls"]).reshape(b, crops, -1)
            both = target.sum(1, keepdims=True)  # the cross-entropy is linear in its target
            local_dino = ssl.cross_entropy(local, both).mean(0).sum() / terms

        # iBOT: every masked patch against the teacher's patch; a masked image's weights sum to 1, and
        # the mean is over all images, as in DINOv2's code.
        rows = masks.rows(self.masks, views["mask"])
        share = 1 / jnp.maximum(mask.sum(1, keepdims=True), 1)
        weight = take_rows(_rows(jnp.broadcast_to(share, mask.shape)), rows)
        hidden = project(student, self.ibot, take_rows(_rows(seen["tokens"]), rows))
        truth = project(teacher, self.ibot, take_rows(_rows(known["tokens"]), rows))
        everywhere = jnp.ones(len(truth))
        patch_target = ssl.assign(c.targets, truth, aux["ibot"], temperature, everywhere)
        ibot = (ssl.cross_entropy(hidden, patch_target) * weight).sum() / (2 * b)

        loss = c.dino * (global_dino + local_dino) + c.ibot * ibot
        metrics = {
            "loss/dino_global": global_dino,
            "loss/dino_local": local_dino,
            "loss/ibot": ibot,
            # Before Sinkhorn, whose own assignment uses every prototype by construction.
            "prototype_usage": ssl.usage(
                ssl.centred_softmax(logits, aux["dino"] * (c.targets == "centring"), temperature),
                jnp.ones(2 * b),
            ),
            "teacher_entropy": ssl.entropy(target),
            "feature_std": (known["cls"] / jnp.linalg.norm(known["cls"], axis=-1, keepdims=True))
            .std(0)
            .mean()
            * np.sqrt(self.config.model.width),
            "ema_momentum": self.momentum(step),
        }
        cls = seen["cls"].reshape(b, 2, -1)
        for name, spread_out in (("koleo", ssl.koleo), ("kde", ssl.kde)):
            if c[name]:
                metrics[f"loss/{name}"] = spread_out(cls[:, 0]) + spread_out(cls[:, 1])
                loss += c[name] * metrics[f"loss/{name}"]
        aux = {
            "dino": ssl.moved_centre(aux["dino"], logits, jnp.ones(2 * b)),
            "ibot": ssl.moved_centre(aux["ibot"], truth, everywhere),
        }
        return loss, (metrics, aux)

    def _kept(self, keys: Array, per_sample: int) -> Array | None:
        """Which rows of (b * per_sample) each residual branch is computed for."""
        depth, block = self.config.model.depth, self.config.batch.block
        return drop_path_rows(keys, depth, self.config.loss.drop_path, block, per_sample)

    def product(self, params: Params) -> Params:
        return params["teacher"]["backbone"]

    def definition(self) -> Definition:
        """What `product` is: the EMA teacher's ViT, read by its CLS token."""
        how = {"resize": 0, "crop": 0, **self.config.encode}
        model = {k: v for k, v in self.config.model.items() if k not in RUNNING}
        return Definition(
            name="dinov2",
            model=model,
            input=Input(
                **how, mean=tuple(self.config.views.mean), std=tuple(self.config.views.std)
            ),
            positions="patches",
            licence="",  # its owner says, when it is exported
            source="trained with pathme_jax",
            mpp=tuple(self.config.batch.mpps),
            tile_px=self.config.batch.window_px,
        )

    def encode(self, product: Params, batch: Mapping[str, Array]) -> Array:
        """(b, h, w, 3) uint8 to (b, d): the CLS token, see `config.encode`."""
        dtype = self.config.model.get("dtype", "float32")
        return patch.encode(self.definition(), {"backbone": product}, batch["image"], dtype)


def _rows(x: Array) -> Array:
    """(b, v, ...) to (b * v, ...): samples stay outermost, so that a sharded batch stays where it is."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} = {value!r}", f"Expected one of {', '.join(allowed)}")
