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

from pathme_jax.errors import UserError
from pathme_jax.losses import self_distillation as ssl
from pathme_jax.losses.features import cosine_distance, effective_rank
from pathme_jax.models.heads import PrototypeHead
from pathme_jax.models.region import COARSE, FINE, HMSA, RegionEncoder, children_of
from pathme_jax.models.transformer import drop_path_rows, take_rows
from pathme_jax.training.contract import TRAINED, BatchSpec, Config, EmaOf, Params, Rules
from pathme_jax.training.keys import substream
from pathme_jax.training.schedules import cosine, linear
from pathme_jax.views import masks

Array = jax.Array
SCALES = ("fine", "coarse")  # 20x and 5x where the finest magnification is 20x
SIDE = {"fine": FINE, "coarse": COARSE}  # tiles along a region's side
CROPS = {"fine": 6, "coarse": 3}  # and along a local crop's
SPATIAL, PROMPT = 0, 1
BLOCK = 4  # regions in a logical block of masks and of drop path


class PatHME:
    """Config: columns, batch, model, hmsa, head, views, loss, ema, steps (see configs/pathme_tiny.py)."""

    def __init__(self, config: Config):
        if config.loss.targets not in ssl.ASSIGNMENTS:
            raise UserError(
                f"config.loss.targets = {config.loss.targets!r}",
                f"Expected one of {', '.join(ssl.ASSIGNMENTS)}",
            )
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
        self.encoder: Any = RegionEncoder(**config.model)
        self.hmsa: Any = HMSA(**config.hmsa)
        self.head: Any = PrototypeHead(**config.head)
        self.masks = {
            scale: masks.MaskPlan(shape=(side, side), per_sample=1, block=BLOCK)
            for scale, side in SIDE.items()
        }
        self.momentum = cosine(config.ema.start, config.ema.end, config.steps)
        self.teacher_temperature = linear(
            config.loss.teacher_temperature,
            config.loss.end_teacher_temperature,
            config.loss.temperature_warmup,
        )

    # ---- parameters ------------------------------------------------------------------------------

    def init(self, key: Array, shapes: Mapping[str, Any]) -> tuple[Params, dict[str, Array]]:
        self._check_columns(shapes)
        keys = jax.random.split(key, 4)
        grid = jnp.zeros((1, *shapes["coarse"].shape[1:]))
        valid = jnp.ones(grid.shape[:3], bool)
        width = self.config.model.width
        encoder = self.encoder.init(keys[0], grid, valid, valid, method="coarse")["params"]
        token = jnp.zeros((1, COARSE**2, width))
        student = {
            "encoder": encoder,
            "head": self.head.init(keys[1], jnp.zeros((1, width)))["params"],
            "hmsa": self.hmsa.init(
                keys[2],
                token,
                jnp.zeros((1, self.config.model.prompts, width)),
                jnp.zeros((1, FINE**2, width)),
                jnp.ones((1, FINE**2), bool),
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

    def _check_columns(self, shapes: Mapping[str, Any]) -> None:
        for alias, column in self.batch_spec.columns.items():
            side = SIDE["coarse" if alias == "coarse" else "fine"]
            if shapes[alias].shape[1:3] != (side, side):
                raise UserError(
                    f"config.columns.{alias.replace('/', '.')}={column} has {shapes[alias].shape[1]} tiles"
                    f" a region side, expected {side}",
                    "fine and experts are at the finest magnification, coarse is four times coarser",
                )
        widths = {scale: shapes[scale].shape[-1] for scale in SCALES}
        if widths["fine"] != widths["coarse"]:
            raise UserError(
                f"config.columns.fine and .coarse are {widths['fine']} and {widths['coarse']} wide",
                "One encoder must have made both: they share the first layer",
            )

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

        The local crops of a scale are (b, l, s, s, f) with their validity beside them.
        """
        views: dict[str, Any] = dict(batch)
        for i, scale in enumerate(SCALES):
            grid, valid = batch[scale], batch[f"{scale}_valid"]
            views[f"{scale}_mask"] = masks.draw(self.masks[scale], substream(keys, i)).reshape(
                valid.shape
            )
            views[f"{scale}_local"], views[f"{scale}_local_valid"] = _cut(
                grid, valid, substream(keys, 2 + i), CROPS[scale], self.config.views.local_crops
            )
        return views

    # ---- losses ----------------------------------------------------------------------------------

    def loss(
        self, params: Params, aux: dict[str, Array], views: Any, keys: Array, step: Array
    ) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
        student, teacher = params["student"], jax.lax.stop_gradient(params["teacher"])
        seen = self._grids(student, views, masked=True, keys=keys)
        known = jax.lax.stop_gradient(self._grids(teacher, views, masked=False, keys=None))
        temperature = self.teacher_temperature(step)
        how = self.config.loss.targets
        b, crops = len(views["fine"]), self.config.views.local_crops

        # PMSD, DINO: each student scale against each teacher scale, whole grids and local crops.
        both = jnp.stack([known[s]["cls"] for s in SCALES], 1)
        logits = self._project(teacher, _rows(both))
        target = ssl.assign(how, logits, aux["dino"], temperature, jnp.ones(2 * b))
        target = target.reshape(b, 2, -1)
        centres = {"dino": ssl.moved_centre(aux["dino"], logits, jnp.ones(2 * b))}
        pairs = {}  # "dino/<student scale>_to_<teacher scale>"
        for scale in SCALES:
            own = self._project(student, seen[scale]["cls"])
            for j, other in enumerate(SCALES):
                pairs[f"dino/{scale}_to_{other}"] = ssl.cross_entropy(own, target[:, j]).mean()
        terms: dict[str, Any] = {
            "dino_global": sum(pairs.values()) / (1 + crops),
            "dino_local": self._local_dino(student, views, target, keys) / (1 + crops),
            "ibot": jnp.zeros(()),
            "koleo": sum(ssl.koleo(seen[scale]["cls"]) for scale in SCALES),
        }

        # PMSD, iBOT: the masked tokens of a scale against the teacher's, averaged over regions.
        for scale in SCALES:
            at, weight = self._masked(views, scale)
            hidden = self._project(student, take_rows(_rows(seen[scale]["tokens"]), at))
            truth = self._project(teacher, take_rows(_rows(known[scale]["tokens"]), at))
            centre = aux[f"ibot_{scale}"]
            goal = ssl.assign(how, truth, centre, temperature, weight)
            terms["ibot"] += (ssl.cross_entropy(hidden, goal) * weight).sum() / b
            there = (weight > 0).astype(jnp.float32)
            centres[f"ibot_{scale}"] = ssl.moved_centre(centre, truth, there)

        terms["mekd"] = self._experts(params, seen, views)
        terms["hmsa"], ranks = self._multi_scale(student, teacher, seen, known, views, keys)

        total: Any = sum(self.config.loss[name] * value for name, value in terms.items())
        cls = known["coarse"]["cls"]
        metrics = {
            **{f"loss/{name}": value for name, value in terms.items()},
            **pairs,
            **ranks,
            "teacher_entropy": ssl.entropy(target),
            "prototype_usage": ssl.usage(target, jnp.ones((b, 2))),
            "feature_std": (cls / jnp.linalg.norm(cls, axis=-1, keepdims=True)).std(0).mean()
            * np.sqrt(cls.shape[-1]),
            "ema_momentum": self.momentum(step),
        }
        return total, (metrics, centres)

    def _grids(self, weights: Params, views: Any, *, masked: bool, keys: Any) -> dict[str, Any]:
        """Both whole grids through the encoder: the student's masked, the teacher's not."""
        out = {}
        for i, scale in enumerate(SCALES):
            out[scale] = self.encoder.apply(
                {"params": weights["encoder"]},
                views[scale],
                views[f"{scale}_valid"],
                views[f"{scale}_mask"] if masked else None,
                None if keys is None else self._kept(substream(keys, i), 1),
                method=scale,
            )
        return out

    def _kept(self, keys: Array, per_region: int) -> Array | None:
        """Which rows of (b * per_region) each residual branch is computed for."""
        rate = self.config.loss.drop_path
        return drop_path_rows(keys, self.config.model.depth, rate, BLOCK, per_region)

    def _project(self, weights: Params, x: Array) -> Array:
        return self.head.apply({"params": weights["head"]}, x)

    def _local_dino(self, student: Params, views: Any, target: Array, keys: Array) -> Array:
        """Local crops, without prompts, against both teacher scales (b, 2, k): the sum over crops of
        their means over regions. A crop without tissue does not count."""
        value = jnp.zeros(())
        for i, scale in enumerate(SCALES):
            grids, valid = views[f"{scale}_local"], views[f"{scale}_local_valid"]
            b, crops = valid.shape[:2]
            cls = self.encoder.apply(
                {"params": student["encoder"]},
                grids.reshape(b * crops, *grids.shape[2:]),
                valid.reshape(b * crops, *valid.shape[2:]),
                None,
                self._kept(substream(keys, 2 + i), crops),
                method="fine",
            )["cls"]
            logits = self._project(student, cls).reshape(b, crops, 1, target.shape[-1])
            each = ssl.cross_entropy(logits, target[:, None]).sum(-1)
            there = valid.any((2, 3)).astype(jnp.float32)
            value += crops * (each * there).sum() / jnp.maximum(there.sum(), 1.0)
        return value

    def _masked(self, views: Any, scale: str) -> tuple[Array, Array]:
        """Rows of each block's tokens that are masked (blocks, t), and each one's weight (blocks * t,).

        A region's weights sum to 1 over its masked tissue; a masked cell without tissue has 0.
        """
        mask = views[f"{scale}_mask"].reshape(len(views[scale]), -1)
        tissue = views[f"{scale}_valid"].reshape(mask.shape)
        at = masks.rows(self.masks[scale], mask[:, None])
        weight = tissue / jnp.maximum((mask & tissue).sum(1, keepdims=True), 1)
        return at, take_rows(weight.reshape(-1), at)

    def _experts(self, params: Params, seen: Any, views: Any) -> Array:
        """MEKD: 1 - mean cos(W h, expert) over every valid 20x token of the masked student."""
        value = jnp.zeros(())
        for name in self.experts:
            tokens = seen["fine"]["tokens"]
            goal = views[f"experts/{name}"].reshape(*tokens.shape[:2], -1)
            there = views[f"experts/{name}_valid"] & views["fine_valid"]
            guess: Any = nn.Dense(goal.shape[-1]).apply({"params": params["experts"][name]}, tokens)
            value += cosine_distance(
                guess, goal, there.reshape(tokens.shape[:2]).astype(jnp.float32)
            )
        return value / max(len(self.experts), 1)

    def _multi_scale(
        self, student: Params, teacher: Params, seen: Any, known: Any, views: Any, keys: Array
    ) -> tuple[Array, dict[str, Array]]:
        """HMSA: (1 - mean cos(MS_student, MS_teacher)) / 0.1, and the ranks that show a collapse."""
        tokens = self._tokens(student["hmsa"], seen, views, substream(keys, 4))
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
            views["fine_valid"].reshape(views["fine"].shape[0], -1),
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

    def inputs(self, product: Params) -> dict[str, Any]:
        """Shapes and types of what `encode` reads of one region."""
        width = product["encoder"]["embed"]["kernel"].shape[0]
        shapes: dict[str, Any] = {}
        for scale, side in SIDE.items():
            shapes[scale] = jax.ShapeDtypeStruct((side, side, width), jnp.float32)
            shapes[f"{scale}_valid"] = jax.ShapeDtypeStruct((side, side), bool)
        return shapes

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


def _rows(x: Array) -> Array:
    """(b, n, d) to (b * n, d)."""
    return x.reshape(-1, x.shape[-1])


def _cut(grid: Array, valid: Array, keys: Array, side: int, count: int) -> tuple[Array, Array]:
    """`count` spatial crops a region: (b, h, w, f), (b, h, w), (b,) keys to (b, l, side, side, f) and
    (b, l, side, side)."""

    def region(values: Array, there: Array, key: Array) -> tuple[Array, Array]:
        def crop(key: Array) -> tuple[Array, Array]:
            at = jax.random.randint(key, (2,), 0, grid.shape[1] - side + 1)
            return (
                jax.lax.dynamic_slice(values, (*at, 0), (side, side, values.shape[-1])),
                jax.lax.dynamic_slice(there, tuple(at), (side, side)),
            )

        return jax.vmap(crop)(jax.random.split(key, count))

    return jax.vmap(region)(grid, valid, keys)
