"""Our DINOv2 step against the same step in PyTorch: one device, same shapes, same precision, in turn.

    python benchmarks/train_step.py [--profile]                       # ViT-tiny, for a CPU
    python benchmarks/train_step.py --size large --batch 64 --precision bfloat16 --prototypes 65536 \\
        --crops 2x224+8x96                                            # for a GPU

PyTorch's side is what a user would put together: timm's VisionTransformer (SDPA) with a mask token,
lightly's head and losses, AdamW (fused), the EMA by `torch._foreach_lerp_`; eager, and with --compile
by torch.compile too. Both start from the same crops and masks on the device, do the
masked student, the teacher, DINO + iBOT + KoLeo with centring and one shared head, clip per
submodule, step AdamW and move the teacher. Making the crops is part of our step on a GPU, so it is
timed beside (`views`). Matrix products of both are counted, to show that the work is the same.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
sys.path.insert(0, str(Path(__file__).parents[1]))  # configs, where the package is not installed

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from configs.dinov2 import get_config
from pathme_jax.methods.dinov2 import DINOv2
from pathme_jax.models.vit import SIZES
from pathme_jax.training import optimiser, watch
from pathme_jax.training.contract import flat, nested
from pathme_jax.training.cost import matmul_flops
from pathme_jax.training.keys import sample_keys
from pathme_jax.views import masks

if not hasattr(torch.ops.torchvision, "nms"):  # torchvision's own may not fit torch's build
    for operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{operator}",
            "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        )
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOProjectionHead
from timm.models.vision_transformer import VisionTransformer

PARTS = ("student", "teacher", "heads and losses", "optimiser and EMA")
TEMPERATURE, MOMENTUM, LR, DECAY, CLIP = 0.04, 0.992, 1e-3, 0.04, 3.0


@dataclasses.dataclass(frozen=True)
class Side:
    """One implementation.

    Attributes:
        step: starts one training step. finish: waits for all that was started; returns the loss.
        parts: name to a function that does that part alone, and waits for it.
        flops: of the matrix products of a step.
        memory: () to peak bytes on the device, 0 where that is not known.
    """

    step: Callable[[], Any]
    finish: Callable[[], float]
    parts: dict[str, Callable[[], Any]]
    flops: int
    memory: Callable[[], int]


# ---------------------------------------------------------------------------------------- what is computed


def configuration(args: argparse.Namespace) -> Any:
    """configs/dinov2.py at the sizes asked for, without what timm has not: layer-wise rates."""
    found = re.fullmatch(r"2x(\d+)\+(\d+)x(\d+)", args.crops)
    if not found:
        raise SystemExit(f"--crops {args.crops}: expected something like 2x224+8x96")
    large, count, small = map(int, found.groups())
    config = get_config("S/16")
    config.batch.update(samples=args.batch, block=min(8, args.batch))
    config.model.update(**SIZES[args.size], grid=large // 16, dtype=args.precision)
    config.model.attention, config.model.unroll = args.attention, args.unroll
    config.head.update(prototypes=args.prototypes, dtype=args.precision)
    config.views.global_crop.px, config.views.local_crop.px = large, small
    config.views.local_crops = count
    config.loss.update(
        targets="centring",
        ibot_head="shared",
        drop_path=args.drop_path,
        teacher_temperature=TEMPERATURE,
        end_teacher_temperature=TEMPERATURE,
    )
    config.ema.update(start=MOMENTUM, end=MOMENTUM)
    config.optimiser.update(lr=LR, end_lr=LR, warmup=0, layer_decay=1.0)
    config.optimiser.update(weight_decay=DECAY, end_weight_decay=DECAY, clip=CLIP)
    config.optimiser.lr_multipliers = ((".*", 1.0),)
    config.optimiser.frozen_until = ((".*", 0),)
    return config


def random_views(method: DINOv2, config: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    b, views = config.batch.samples, config.views
    large, small = views.global_crop.px, views.local_crop.px
    keys = sample_keys(0, "masks", jnp.arange(b, dtype=jnp.uint32))
    return {
        "globals": rng.standard_normal((b, 2, large, large, 3), np.float32),
        "locals": rng.standard_normal((b, views.local_crops, small, small, 3), np.float32),
        "mask": np.asarray(masks.draw(method.masks, keys)),
    }


# ------------------------------------------------------------------------------------------------- our side


class Fixed:
    """Stands in for the backbone, so that heads and losses are timed alone."""

    def __init__(self, seen: Any, known: Any):
        self.seen, self.known = seen, known

    def apply(self, weights: Any, images: Any, method: str = "") -> Any:
        return self.seen if method == "groups" else self.known


def ours(method: DINOv2, config: Any, given: dict[str, np.ndarray]) -> Side:
    views = jax.device_put(given)
    b = config.batch.samples
    keys = sample_keys(0, "loss", jnp.arange(b, dtype=jnp.uint32))
    params, aux = jax.jit(lambda: method.init(jax.random.key(0), {}))()
    student = {f"student/{p}": v for p, v in flat(params["student"]).items()}
    init, update = optimiser.make(config.optimiser, config.steps, jax.eval_shape(lambda: student))
    state = {
        "student": student,
        "teacher": jax.tree.map(jnp.copy, student),
        "opt": init(student),
        "aux": aux,
    }

    def full(student: Any, teacher: Any) -> Any:
        return {"student": nested(student)["student"], "teacher": nested(teacher)["student"]}

    def move(state: Any, grads: Any) -> Any:
        student, opt, norms = update(grads, state["opt"], state["student"], jnp.zeros((), int))
        teacher = optax.incremental_update(student, state["teacher"], 1 - MOMENTUM)
        return {**state, "student": student, "teacher": teacher, "opt": opt}, norms

    def step(state: Any, views: Any) -> Any:
        def loss(student: Any) -> Any:
            both = full(student, state["teacher"])
            return method.loss(both, state["aux"], views, keys, jnp.zeros((), int))

        (value, (metrics, aux)), grads = jax.value_and_grad(loss, has_aux=True)(state["student"])
        state, norms = move({**state, "aux": aux}, grads)
        return state, {"loss": value, **metrics, **norms}

    flops = matmul_flops(step, state, views)
    jitted: Any = jax.jit(step, donate_argnums=0)
    now: dict[str, Any] = {"state": state}

    def run() -> None:
        now["state"], now["metrics"] = jitted(now["state"], views)

    def finish() -> float:
        if jitted._cache_size() != 1:
            raise SystemExit("our step was compiled again")
        return float(jax.block_until_ready(now)["metrics"]["loss"])

    # The parts, each compiled alone.
    def rows(x: Any) -> Any:
        return x.reshape(-1, *x.shape[2:])

    def features(student: Any, views: Any) -> Any:
        groups: list[Any] = [
            (rows(views["globals"]), rows(views["mask"]), method._kept(keys, 2)),
            (rows(views["locals"]), None, method._kept(keys, config.views.local_crops)),
        ]
        weights = {"params": nested(student)["student"]["backbone"]}
        return method.backbone.apply(weights, groups, method="groups")

    @jax.jit
    def student_part(student: Any, views: Any) -> Any:
        def total(student: Any) -> Any:
            return sum(
                jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(features(student, views))
            )

        return jax.grad(total)(student)

    @jax.jit
    def teacher_part(teacher: Any, views: Any) -> Any:
        weights = {"params": nested(teacher)["student"]["backbone"]}
        return method.backbone.apply(weights, rows(views["globals"]))

    @jax.jit
    def losses_part(state: Any, seen: Any, known: Any, views: Any) -> Any:
        def loss(student: Any, seen: Any) -> Any:
            alone = copy.copy(method)
            alone.backbone = Fixed(seen, known)
            both = full(student, state["teacher"])
            return alone.loss(both, state["aux"], views, keys, jnp.zeros((), int))[0]

        heads = {p: v for p, v in state["student"].items() if "/backbone/" not in p}
        rest = {p: v for p, v in state["student"].items() if "/backbone/" in p}
        return jax.grad(lambda h, seen: loss({**rest, **h}, seen), (0, 1))(heads, seen)

    update_part = jax.jit(move, donate_argnums=0)
    held: dict[str, Any] = {}

    def prepare() -> dict[str, Any]:
        if not held:
            student, teacher = now["state"]["student"], now["state"]["teacher"]
            held["seen"] = jax.jit(features)(student, views)
            held["known"] = teacher_part(teacher, views)
            held["grads"] = jax.tree.map(jnp.ones_like, student)
        return held

    def update_alone() -> None:
        now["state"], norms = update_part(now["state"], prepare()["grads"])
        jax.block_until_ready((now["state"], norms))

    window = jnp.zeros((b, config.batch.window_px, config.batch.window_px, 3), jnp.uint8)
    make_views = jax.jit(lambda window: method.views({"window": window}, keys))
    parts = {
        "student": lambda: jax.block_until_ready(student_part(now["state"]["student"], views)),
        "teacher": lambda: jax.block_until_ready(teacher_part(now["state"]["teacher"], views)),
        "heads and losses": lambda: jax.block_until_ready(
            losses_part(now["state"], prepare()["seen"], prepare()["known"], views)
        ),
        "optimiser and EMA": update_alone,
        "views": lambda: jax.block_until_ready(make_views(window)),
    }

    def memory() -> int:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    return Side(run, finish, parts, flops, memory)


# -------------------------------------------------------------------------------------------- PyTorch's side


class MaskedViT(torch.nn.Module):
    """timm's VisionTransformer with iBOT's mask token: images and mask to (CLS, patch tokens)."""

    def __init__(self, **kind: Any):
        super().__init__()
        self.vit = VisionTransformer(num_classes=0, dynamic_img_size=True, **kind)
        self.mask_token = torch.nn.Parameter(torch.zeros(kind["embed_dim"]))

    def forward(self, images: Any, mask: Any = None) -> Any:
        tokens = self.vit.patch_embed(images)  # (b, rows, columns, d)
        if mask is not None:
            hidden = mask.view(*tokens.shape[:3], 1)
            tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        tokens = self.vit.norm(self.vit.blocks(self.vit._pos_embed(tokens)))
        return tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :]


def pytorch(config: Any, given: dict[str, np.ndarray], device: str, compiled: bool) -> Side:
    torch.manual_seed(0)
    m, h = config.model, config.head
    kind = dict(
        img_size=config.views.global_crop.px,
        patch_size=m.patch,
        embed_dim=m.width,
        depth=m.depth,
        num_heads=m.heads,
        mlp_ratio=m.mlp_ratio,
        init_values=m.layer_scale,
        reg_tokens=m.registers,
        drop_path_rate=config.loss.drop_path,
    )

    def networks() -> list[Any]:
        head = DINOProjectionHead(m.width, h.hidden, h.bottleneck, h.prototypes)
        return [MaskedViT(**kind).to(device), head.to(device)]

    (backbone, head), (backbone_t, head_t) = networks(), networks()
    for one, other in ((backbone_t, backbone), (head_t, head)):
        one.load_state_dict(other.state_dict())
        one.eval()
    trained = [p for p in (*backbone.parameters(), *head.parameters()) if p.requires_grad]
    pairs = [
        (q, p)
        for q, p in zip(
            (*backbone_t.parameters(), *head_t.parameters()),
            (*backbone.parameters(), *head.parameters()),
            strict=True,
        )
        if p.requires_grad
    ]
    followers = [q.detach() for q, _ in pairs]
    followed = [p.detach() for _, p in pairs]
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LR,
        fused=True,
    )
    dino = DINOLoss(h.prototypes, TEMPERATURE, TEMPERATURE).to(device)
    ibot, koleo = IBOTPatchLoss(h.prototypes, TEMPERATURE).to(device), KoLeoLoss()
    b, crops = config.batch.samples, config.views.local_crops
    side = config.views.global_crop.px // m.patch

    def images(x: np.ndarray) -> Any:  # view-major, as lightly's losses want the views
        x = np.ascontiguousarray(x.transpose(1, 0, 4, 2, 3).reshape(-1, 3, *x.shape[2:4]))
        return torch.from_numpy(x).to(device)

    whole, small = images(given["globals"]), images(given["locals"])
    mask = torch.from_numpy(given["mask"].transpose(1, 0, 2).reshape(2 * b, -1)).to(device)
    at = mask.flatten().nonzero().flatten()
    precision = torch.autocast(device, torch.bfloat16, enabled=m.dtype == "bfloat16")
    run_student: Any = torch.compile(backbone) if compiled else backbone
    run_teacher: Any = torch.compile(backbone_t) if compiled else backbone_t

    def student() -> Any:
        with precision:
            return run_student(whole, mask), run_student(small)[0]

    def teacher() -> Any:
        with torch.no_grad(), precision:
            return run_teacher(whole)

    def losses(seen: Any, near: Any, known: Any) -> Any:
        def masked(tokens: Any) -> Any:
            return tokens.flatten(0, 1).index_select(0, at)

        with precision:
            with torch.no_grad():
                target, truth = head_t(known[0]).float(), head_t(masked(known[1])).float()
            own, hidden = head(seen[0]).float(), head(masked(seen[1])).float()
            views = [*own.chunk(2), *head(near).float().chunk(crops)]
        spread = sum(koleo(x.float()) for x in seen[0].chunk(2))
        return (
            dino(list(target.chunk(2)), views)
            + ibot(truth, hidden, mask.view(-1, side, side))
            + config.loss.koleo * spread
        )

    def update() -> None:
        for part in (backbone, head):
            torch.nn.utils.clip_grad_norm_(part.parameters(), CLIP)
        adam.step()
        torch._foreach_lerp_(followers, followed, 1 - MOMENTUM)

    now: dict[str, Any] = {}

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        seen, near = student()
        now["loss"] = losses(seen, near, teacher())
        now["loss"].backward()
        update()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def finish() -> float:
        wait()
        return float(now["loss"].detach())

    def alone(part: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            adam.zero_grad(set_to_none=True)
            part()
            wait()

        return run

    held: list[Any] = []

    def losses_alone() -> None:
        if not held:
            (cls, tokens), near = student()
            held.append([x.detach().requires_grad_() for x in (cls, tokens, near)])
            held.append(teacher())
        cls, tokens, near = held[0]
        losses((cls, tokens), near, held[1]).backward()

    def student_alone() -> None:
        (cls, tokens), near = student()
        (cls.sum() + tokens.sum() + near.sum()).backward()

    def update_alone() -> None:
        for p in trained:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
        update()
        wait()

    parts = {
        "student": alone(student_alone),
        "teacher": alone(teacher),
        "heads and losses": alone(losses_alone),
        "optimiser and EMA": update_alone,
    }
    flops = 0
    if not compiled:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            step()
        flops = counter.get_total_flops()

    def memory() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else 0

    return Side(step, finish, parts, flops, memory)


# ----------------------------------------------------------------------------------------------- measuring


def seconds(work: Callable[[], Any], finish: Callable[[], Any], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        work()
    finish()
    return (time.perf_counter() - started) / count


def spread(values: np.ndarray, digits: int) -> str:
    return f"{np.median(values):.{digits}f} ({values.min():.{digits}f}–{values.max():.{digits}f})"


def profile(sides: dict[str, Side], repeats: int) -> None:
    """Each part alone, in turn; the first call of each compiles and is left out."""
    print(f"\n| ms a step, part alone | {' | '.join(sides)} |")
    print("|---" * (len(sides) + 1) + "|")
    for part in (*PARTS, "views"):
        having = {name: side.parts[part] for name, side in sides.items() if part in side.parts}
        for work in having.values():
            work()
        times = {name: [] for name in having}
        for _ in range(repeats):
            for name, work in having.items():
                times[name].append(seconds(work, lambda: None, 1) * 1e3)
        cells = [spread(np.array(times[name]), 0) if name in times else "" for name in sides]
        print(f"| {part} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "small", "base", "large"), default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crops", default="2x224+2x96")
    parser.add_argument("--prototypes", type=int, default=4096)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="ours")
    parser.add_argument("--unroll", type=int, default=1, help="layers a turn of our scan")
    parser.add_argument(
        "--drop-path", type=float, default=0.0, help="ours leaves the work out, timm not"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="PyTorch also with torch.compile (default: on a GPU; on a CPU it takes minutes)",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="a turn")
    parser.add_argument("--profile", action="store_true", help="time the parts, each alone")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (jax.default_backend() == "gpu") != (device == "cuda"):
        raise SystemExit(f"JAX runs on {jax.default_backend()}, PyTorch on {device}")
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as XLA
    if args.precision == "float32":  # without TF32, as torch's default
        jax.config.update("jax_default_matmul_precision", "highest")
    config = configuration(args)
    method = DINOv2(config)
    given = random_views(method, config)

    sides = {"pathme_jax": ours(method, config, given)}
    sides["PyTorch eager"] = pytorch(config, given, device, compiled=False)
    if args.compile:
        try:
            compiled = pytorch(config, given, device, compiled=True)
            compiled.step()
            sides["PyTorch compiled"] = compiled
        except Exception as error:  # whatever the compiler of the day raises
            print(f"torch.compile does not work here: {type(error).__name__}: {str(error)[:200]}\n")
    for side in sides.values():
        side.step()
        side.finish()
    print(
        f"ViT-{args.size}/16, batch {args.batch}, crops {args.crops}, {args.prototypes} prototypes,"
        f" {args.precision}, drop path {args.drop_path}, on {jax.devices()[0].device_kind}"
        f" ({len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f});"
        f" {args.repeats} turns of {args.steps} steps\n"
    )
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses = {}
    for _ in range(args.repeats):
        for name, side in sides.items():
            times[name].append(seconds(side.step, side.finish, args.steps))
    for name, side in sides.items():
        losses[name] = side.finish()
    own = np.array(times["pathme_jax"])
    peak = watch.peak_flops(jax.devices()[0])
    print("| | img/s | ours / theirs | GFLOP in products an image | MFU | peak GiB | loss |")
    print("|---|---|---|---|---|---|---|")
    flops = {name: side.flops or sides["PyTorch eager"].flops for name, side in sides.items()}
    for name, side in sides.items():
        took = np.array(times[name])
        ratio = "" if name == "pathme_jax" else spread(took / own, 2)
        mfu = f"{flops[name] / np.median(took) / peak:.1%}" if peak else "–"
        memory = side.memory()
        print(
            f"| {name} | {spread(args.batch / took, 2)} | {ratio} |"
            f" {flops[name] / args.batch / 1e9:.1f} | {mfu} |"
            f" {f'{memory / 2**30:.1f}' if memory else '–'} | {losses[name]:.3f} |"
        )
    if args.profile:
        profile(sides, args.repeats)


if __name__ == "__main__":
    main()
