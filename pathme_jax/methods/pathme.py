"""PatHME: prompt-guided multi-scale distillation (PMSD), multi-expert distillation (MEKD) and
hierarchical multi-scale attention (HMSA) over the tile features of a region (METHODS 2.1).

One ViT, shared by both magnifications, learns from its own EMA teacher. Departures from the paper,
each because the published code cannot run as it stands: experts get a linear projector (their widths
differ from ours) and are standardised; local crops are spatial crops of the grid; missing tissue is
masked in attention and carries no loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pathme_jax.losses import self_distillation as ssl
from pathme_jax.losses.features import cosine_distance, effective_rank
from pathme_jax.models.heads import PrototypeHead
from pathme_jax.models.region import COARSE, HMSA, RegionEncoder, children_of
from pathme_jax.models.transformer import drop_path_factors
from pathme_jax.training.contract import TRAINED, BatchSpec, EmaOf, Params, Rules
from pathme_jax.training.keys import substream
from pathme_jax.training.schedules import cosine, linear
from pathme_jax.views.masks import block_masks, mask_counts

Array = jax.Array
SCALES = ("fine", "coarse")  # 20x and 5x where the finest magnification is 20x
CROPS = {"fine": 6, "coarse": 3}  # side of a local crop, in tiles
SPATIAL, PROMPT = 0, 1
MASK_BLOCK = 4


class PatHME:
    """Config: columns, batch, model, hmsa, head, views, loss, ema, steps (see configs/pathme_tiny.py)."""

    def __init__(self, config: ConfigDict):
        self.config = config
        self.experts = sorted(config.columns.experts)
        self.batch_spec = BatchSpec(
            record="regions",
            samples=config.batch.samples,
            columns={
                "fine": config.columns.fine,
                "coarse": config.columns.coarse,
                **{f"experts/{name}": config.columns.experts[name] for name in self.experts},
            },
        )
        self.encoder = RegionEncoder(**config.model)
        self.hmsa = HMSA(**config.hmsa)
        self.head = PrototypeHead(**config.head)
        self.counts = {
            scale: mask_counts(config.batch.samples, side**2, (0.1, 0.5), 0.5, MASK_BLOCK)
            for scale, side in (("fine", 16), ("coarse", 4))
        }
        self.momentum = cosine(config.ema.start, config.ema.end, config.steps)
        self.teacher_temperature = linear(
            config.loss.teacher_temperature,
            config.loss.end_teacher_temperature,
            config.loss.temperature_warmup,
        )

    # ---- parameters ------------------------------------------------------------------------------

    def init(self, key: Array, shapes: Mapping[str, Any]) -> tuple[Params, dict[str, Array]]:
        keys = jax.random.split(key, 4)
        grid = {s: jnp.zeros((1, *shapes[s].shape[1:])) for s in SCALES}
        valid = {s: jnp.ones(grid[s].shape[:3], bool) for s in SCALES}
        width = self.config.model.width
        encoder = self.encoder.init(
            keys[0], grid["coarse"], valid["coarse"], valid["coarse"], method="coarse"
        )["params"]
        token = jnp.zeros((1, 16, width))
        student = {
            "encoder": encoder,
            "head": self.head.init(keys[1], jnp.zeros((1, width)))["params"],
            "hmsa": self.hmsa.init(
                keys[2],
                token,
                token[:, : self.config.model.prompts],
                jnp.zeros((1, 256, width)),
                jnp.ones((1, 256), bool),
            )["params"],
        }
        params: Params = {"student": student, "teacher": student}
        for i, name in enumerate(self.experts):
            out = shapes[f"experts/{name}"].shape[-1]
            params.setdefault("experts", {})[name] = nn.Dense(out).init(
                jax.random.fold_in(keys[3], i), jnp.zeros((1, width))
            )["params"]
        centre = jnp.zeros((self.config.head.prototypes,))
        return params, {name: centre for name in ("dino", "ibot_fine", "ibot_coarse")}

    @property
    def roles(self) -> Rules:
        return [
            ("student/.*", TRAINED),
            ("teacher/(.*)", EmaOf(r"student/\1", self.momentum)),
            ("experts/.*", TRAINED),
        ]

    # ---- views -----------------------------------------------------------------------------------

    def views(self, batch: Mapping[str, Array], keys: Array) -> dict[str, Any]:
        """Whole grids with validity, masks for the student, spatial local crops of both scales.

        A local crop of a scale is (l, b, s, s, f) with its validity beside it.
        """
        views: dict[str, Any] = {k: v for k, v in batch.items()}
        for i, scale in enumerate(SCALES):
            side = batch[scale].shape[1]
            views[f"{scale}_mask"] = block_masks(
                substream(keys, 10 + i), self.counts[scale], (side, side)
            )
            views[f"{scale}_local"], views[f"{scale}_local_valid"] = jax.vmap(
                lambda n, scale=scale, i=i: _local(
                    batch[scale],
                    batch[f"{scale}_valid"],
                    jax.vmap(lambda k: jax.random.fold_in(k, n))(substream(keys, 20 + i)),
                    CROPS[scale],
                )
            )(jnp.arange(self.config.views.local_crops))
        return views

    # ---- losses ----------------------------------------------------------------------------------

    def loss(
        self, params: Params, aux: dict[str, Array], views: Any, keys: Array, step: Array
    ) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
        student, teacher = params["student"], jax.lax.stop_gradient(params["teacher"])
        seen = self._grids(student, views, masked=True, keys=keys)
        known = jax.lax.stop_gradient(self._grids(teacher, views, masked=False, keys=None))
        terms, metrics, aux = self._self_distillation(
            student, teacher, seen, known, views, aux, keys, self.teacher_temperature(step)
        )
        terms["mekd"] = self._experts(params, seen, views)
        terms["hmsa"], ranks = self._multi_scale(student, teacher, seen, known, views, keys)
        total = sum(self.config.loss[name] * value for name, value in terms.items())
        metrics |= {f"loss/{name}": value for name, value in terms.items()}
        return total, ({**metrics, **ranks, "ema_momentum": self.momentum(step)}, aux)

    def _grids(self, weights: Params, views: Any, *, masked: bool, keys: Any) -> dict[str, Any]:
        """Both whole grids through the encoder: the student's masked, the teacher's not."""
        out = {}
        for i, scale in enumerate(SCALES):
            mask = views[f"{scale}_mask"] if masked else None
            keep = None
            if keys is not None:
                rate = self.config.loss.drop_path
                keep = drop_path_factors(substream(keys, i), self.config.model.depth, rate)
            out[scale] = self.encoder.apply(
                {"params": weights["encoder"]},
                views[scale],
                views[f"{scale}_valid"],
                mask,
                keep,
                method=scale,
            )
        return out

    def _self_distillation(
        self,
        student: Params,
        teacher: Params,
        seen: Any,
        known: Any,
        views: Any,
        aux: dict[str, Array],
        keys: Array,
        temperature: Array,
    ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
        """PMSD: DINO over all four (student scale, teacher scale) pairs, iBOT and KoLeo per scale."""

        def project(weights: Params, x: Array) -> Array:
            return self.head.apply({"params": weights["head"]}, x)

        b, crops = len(views["fine"]), self.config.views.local_crops
        logits = jnp.stack([project(teacher, known[s]["cls"]) for s in SCALES])
        target = self._targets(logits.reshape(2 * b, -1), aux["dino"], temperature, jnp.ones(2 * b))
        target = target.reshape(2, b, -1)

        pairs = {}
        local_sum = jnp.zeros(())
        for i, scale in enumerate(SCALES):
            own = project(student, seen[scale]["cls"])
            for j, other in enumerate(SCALES):
                pairs[f"{scale}_to_{other}"] = ssl.cross_entropy(own, target[j]).mean()
            local = views[f"{scale}_local"].reshape(crops * b, *views[f"{scale}_local"].shape[2:])
            valid = views[f"{scale}_local_valid"].reshape(local.shape[:3])
            keep = drop_path_factors(
                jnp.concatenate([substream(keys, 40 + 20 * i + n) for n in range(crops)]),
                self.config.model.depth,
                self.config.loss.drop_path,
            )
            cls = self.encoder.apply(
                {"params": student["encoder"]}, local, valid, None, keep, method="fine"
            )["cls"]
            there = valid.any((1, 2)).reshape(crops, b).astype(jnp.float32)
            each = ssl.cross_entropy(
                project(student, cls).reshape(crops, 1, b, -1), target[None]
            ).sum(1)
            local_sum += crops * (each * there).sum() / jnp.maximum(there.sum(), 1.0)

        terms = {
            "dino_global": sum(pairs.values()) / (1 + crops),
            "dino_local": local_sum / (1 + crops),
        }
        centres = {"dino": ssl.moved_centre(aux["dino"], logits, jnp.ones((2, b)))}
        ibot, spread = jnp.zeros(()), jnp.zeros(())
        for scale in SCALES:
            value, centres[f"ibot_{scale}"] = self._masked_tokens(
                project,
                student,
                teacher,
                seen[scale],
                known[scale],
                views,
                scale,
                aux[f"ibot_{scale}"],
                temperature,
            )
            ibot += value
            spread += ssl.koleo(seen[scale]["cls"])
        terms |= {"ibot": ibot, "koleo": spread}
        cls = known["coarse"]["cls"]
        metrics = {f"dino/{name}": value for name, value in pairs.items()}
        metrics |= {
            "teacher_entropy": ssl.entropy(target),
            "prototype_usage": ssl.usage(target, jnp.ones((2, b))),
            "feature_std": (cls / jnp.linalg.norm(cls, axis=-1, keepdims=True)).std(0).mean()
            * np.sqrt(cls.shape[-1]),
        }
        return terms, metrics, centres

    def _masked_tokens(
        self,
        project: Any,
        student: Params,
        teacher: Params,
        seen: Any,
        known: Any,
        views: Any,
        scale: str,
        centre: Array,
        temperature: Array,
    ) -> tuple[Array, Array]:
        """iBOT of one scale: masked tokens that are tissue, each region weighing 1."""
        mask = views[f"{scale}_mask"].reshape(len(views[scale]), -1)
        real = views[f"{scale}_valid"].reshape(mask.shape)
        at = jnp.nonzero(mask.reshape(-1), size=int(self.counts[scale].sum()))[0]
        counted = (mask & real).sum(1)
        weight = real.reshape(-1)[at].astype(jnp.float32)
        width = seen["tokens"].shape[-1]
        hidden = project(student, seen["tokens"].reshape(-1, width)[at])
        truth = project(teacher, known["tokens"].reshape(-1, width)[at])
        target = self._targets(truth, centre, temperature, weight)
        share = weight / jnp.maximum(counted, 1)[at // mask.shape[1]]
        value = (ssl.cross_entropy(hidden, target) * share).sum()
        return value / jnp.maximum((counted > 0).sum(), 1), ssl.moved_centre(centre, truth, weight)

    def _targets(self, logits: Array, centre: Array, temperature: Array, weight: Array) -> Array:
        if self.config.loss.targets == "sinkhorn":
            return ssl.sinkhorn(logits, temperature, weight)
        return ssl.centred_softmax(logits, centre, temperature)

    def _experts(self, params: Params, seen: Any, views: Any) -> Array:
        """MEKD: 1 - mean cos(W h, expert) over every valid 20x token of the masked student."""
        value = jnp.zeros(())
        for name in self.experts:
            tokens = seen["fine"]["tokens"]
            goal = views[f"experts/{name}"].reshape(*tokens.shape[:2], -1)
            there = views[f"experts/{name}_valid"] & views["fine_valid"]
            guess = nn.Dense(goal.shape[-1]).apply({"params": params["experts"][name]}, tokens)
            value += cosine_distance(
                guess, goal, there.reshape(tokens.shape[:2]).astype(jnp.float32)
            )
        return value / max(len(self.experts), 1)

    def _multi_scale(
        self, student: Params, teacher: Params, seen: Any, known: Any, views: Any, keys: Array
    ) -> tuple[Array, dict[str, Array]]:
        """HMSA: (1 - mean cos(MS_student, MS_teacher)) / 0.1, and the ranks that show a collapse."""
        tokens = self._tokens(student["hmsa"], seen, views, substream(keys, 90))
        goal = jax.lax.stop_gradient(self._tokens(teacher["hmsa"], known, views, None))
        weight = self._token_valid(views).astype(jnp.float32)
        value = cosine_distance(tokens, goal, weight) / 0.1
        inputs = jnp.concatenate([known["coarse"]["pre_norm"], known["coarse"]["prompts"]], 1)
        width = goal.shape[-1]
        return value, {
            "effective_rank/hmsa": effective_rank(goal.reshape(-1, width), weight.reshape(-1)),
            "effective_rank/hmsa_inputs": effective_rank(
                inputs.reshape(-1, width), weight.reshape(-1)
            ),
        }

    def _tokens(self, weights: Params, grids: Any, views: Any, keys: Array | None) -> Array:
        return self.hmsa.apply(
            {"params": weights},
            grids["coarse"]["pre_norm"],
            grids["coarse"]["prompts"],
            grids["fine"]["pre_norm"],
            views["fine_valid"].reshape(len(views["fine"]), -1),
            keys,
        )

    def _token_valid(self, views: Mapping[str, Array]) -> Array:
        """(b, 16 + p): a 5x token needs its own feature and one valid child; prompts need any tissue."""
        children = children_of(views["fine_valid"]).any(-1)
        coarse = views["coarse_valid"].reshape(children.shape) & children
        prompts = jnp.repeat(coarse.any(1, keepdims=True), self.config.model.prompts, 1)
        return jnp.concatenate([coarse, prompts], 1)

    # ---- what others use -------------------------------------------------------------------------

    def product(self, params: Params) -> Params:
        """The EMA teacher's encoder and HMSA: the paper's inference path."""
        return {"encoder": params["teacher"]["encoder"], "hmsa": params["teacher"]["hmsa"]}

    def encode(self, product: Params, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Multi-scale tokens of whole regions: 16 spatial ones, then the prompts."""
        grids = self._grids(product, batch, masked=False, keys=None)
        prompts = self.config.model.prompts
        cell = np.stack(np.meshgrid(range(COARSE), range(COARSE), indexing="ij"), -1).reshape(-1, 2)
        return {
            "features": self._tokens(product["hmsa"], grids, batch, None),
            "valid": self._token_valid(batch),
            "kind": jnp.array([SPATIAL] * COARSE**2 + [PROMPT] * prompts),
            "cell": jnp.concatenate([cell, np.zeros((prompts, 2), int)]),
        }


def _local(grid: Array, valid: Array, keys: Array, side: int) -> tuple[Array, Array]:
    """One spatial crop a sample: (b, h, w, f), (b, h, w) to (b, side, side, f), (b, side, side)."""

    def cut(values: Array, there: Array, key: Array) -> tuple[Array, Array]:
        at = jax.random.randint(key, (2,), 0, grid.shape[1] - side + 1)
        return (
            jax.lax.dynamic_slice(values, (*at, 0), (side, side, values.shape[-1])),
            jax.lax.dynamic_slice(there, tuple(at), (side, side)),
        )

    return jax.vmap(cut)(grid, valid, keys)
