"""A whole cross-validation at once against one head after another: gated ABMIL, 5 folds × 5 seeds.

    python benchmarks/mil_speed.py --bags musk1            # needs torch, torchmil and the package `mil`
    python benchmarks/mil_speed.py --bags 40x500-4000x1024

Three ways to train the same 25 heads for the same epochs on the same folds, in turn: pathme_jax's population;
torchmil's ABMIL; and a bare PyTorch head of the same layers. The two of PyTorch go through the members one by
one, a bag a step, as their users' loops do. Compilation is given apart, as it is paid once.
"""

from __future__ import annotations

import argparse
import runpy
import time
from pathlib import Path
from typing import Any

import numpy as np

from pathme_jax.evaluation.auroc import auroc
from pathme_jax.mil import buckets, population
from pathme_jax.mil.folds import TEST, TRAIN
from pathme_jax.mil.heads.abmil import ABMIL
from pathme_jax.mil.tasks import Task, Tasks

FOLDS, SEEDS = 5, 5


def bags_of(text: str) -> tuple[list[np.ndarray], np.ndarray]:
    """musk1, musk2, elephant; or <bags>x<least>-<most>x<width> of random numbers with a planted class."""
    if "x" not in text:
        classic: Any = runpy.run_path(str(Path(__file__).with_name("mil_classic.py")))
        return classic["read"](text)
    count, lengths, width = text.split("x")
    low, high = map(int, lengths.split("-"))
    rng = np.random.default_rng(0)
    sizes = np.linspace(low, high, int(count)).astype(int)
    bags = [rng.standard_normal((n, int(width)), np.float32) for n in sizes]
    labels = np.arange(len(bags)) % 2
    for bag, label in zip(bags, labels, strict=True):
        bag[: len(bag) // 20, :8] += 2 * label
    return bags, labels


def members(labels: np.ndarray) -> population.Members:
    fold = np.random.default_rng(0).permutation(len(labels)) % FOLDS
    each = np.arange(FOLDS * SEEDS)
    parts = np.where(fold == each[:, None] // SEEDS, TEST, TRAIN)
    return population.Members(
        parts=parts,
        targets=np.tile(labels.astype(np.float32), (len(each), 1))[..., None],
        weights=(parts == TRAIN).astype(np.float32)[..., None],
        seeds=each % SEEDS,
        rates=np.full(len(each), 1e-4),
        decays=np.full(len(each), 1e-5),
    )


def fitted(
    packed: Any, of: population.Members, embed: tuple[int, ...], epochs: int
) -> population.Population:
    tasks = Tasks((Task("y", "classes", ("0", "1")),))
    head = ABMIL(2, embed=embed, attention=128, dropout=0.0)
    return population.fit(head, tasks, packed, of, population.Schedule(epochs), progress=False)


def ours(packed: Any, of: population.Members, embed: tuple[int, ...], epochs: int) -> float:
    started = time.perf_counter()
    fitted(packed, of, embed, epochs)
    return time.perf_counter() - started


def alone(packed: Any, of: population.Members, embed: tuple[int, ...], epochs: int) -> str:
    """The first seed of every fold in the population, and trained by itself."""
    together = fitted(packed, of, embed, epochs)
    first = np.arange(FOLDS) * SEEDS
    singles = [fitted(packed, of.take([i]), embed, epochs) for i in first]
    gaps = []
    for i, single in zip(first, singles, strict=True):
        seen = np.flatnonzero(~np.isnan(single.losses[:, 0]))[:20]
        gaps.append(np.abs(single.losses[seen, 0] - together.losses[seen, i]).max())
    rows = np.argwhere(of.parts[first] == TEST)
    truth = of.targets[first[rows[:, 0]], rows[:, 1], 0].astype(int)
    pairs = np.stack([first[rows[:, 0]], rows[:, 1]], 1)
    inside = population.predict(together, packed, pairs)[0]
    outside = np.zeros_like(inside)
    for fold, single in enumerate(singles):
        mine = rows[:, 0] == fold
        outside[mine] = population.predict(single, packed, rows[mine] * [0, 1])[0]
    found = [auroc(scores, truth, rows[:, 0]) for scores in (inside, outside)]
    return (
        f"a member of the population and the same alone: losses of the first 20 steps differ by {max(gaps):.1e} at"
        f" most, out-of-fold AUROC {found[0]:.4f} and {found[1]:.4f}"
    )


def torch_loop(
    make: Any, bags: list[np.ndarray], labels: np.ndarray, of: population.Members, epochs: int
) -> float:
    import torch

    started = time.perf_counter()
    x = [torch.from_numpy(bag) for bag in bags]
    for member in range(len(of)):
        torch.manual_seed(int(of.seeds[member]))
        model = make()
        adam = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=1e-5)
        train = np.flatnonzero(of.parts[member] == TRAIN)
        for epoch in range(epochs):
            for i in np.random.default_rng(epoch).permutation(train).tolist():
                adam.zero_grad()
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    model(x[i]).reshape(()), torch.tensor(float(labels[i]))
                )
                loss.backward()
                adam.step()
    return time.perf_counter() - started


def bare(width: int, embed: tuple[int, ...]) -> Any:
    """Gated ABMIL of the same layers as ours, in PyTorch."""
    import torch
    from torch import nn

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = (
                nn.Sequential(nn.Linear(width, embed[0]), nn.ReLU()) if embed else nn.Identity()
            )
            inner = embed[-1] if embed else width
            self.tanh, self.gate = nn.Linear(inner, 128), nn.Linear(inner, 128)
            self.attend, self.classify = nn.Linear(128, 1, bias=False), nn.Linear(inner, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.embed(x)
            a = self.attend(torch.tanh(self.tanh(h)) * torch.sigmoid(self.gate(h)))
            return self.classify((torch.softmax(a, 0) * h).sum(0))

    return Bare


def torchmils(width: int, embed: tuple[int, ...]) -> Any:
    import torch
    from torchmil.models import ABMIL as Theirs

    class Batched(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            features = torch.nn.Sequential(torch.nn.Linear(width, embed[0]), torch.nn.ReLU())
            self.model = Theirs((width,), att_dim=128, gated=True, feat_ext=features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x[None])

    return Batched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bags", default="musk1")
    parser.add_argument("--embed", type=int, default=0, help="0: 64 for classic data, else 512")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    bags, labels = bags_of(args.bags)
    large = "x" in args.bags
    embed, epochs = (args.embed or (512 if large else 64),), args.epochs or (1 if large else 10)
    # Large bags are worth more compilations: a real run sees them for many epochs.
    fine: Any = {"waste": 1.02, "sizes": 32, "saved": 0} if large else {}
    of, packed = members(labels), buckets.pack(bags, **fine)
    width = bags[0].shape[1]
    first = ours(packed, of, embed, epochs)
    print(
        f"{args.bags}: {len(bags)} bags, {len(of)} members, {epochs} epochs, embed {embed[0]}; padding x"
        f" {buckets.waste(packed):.2f} in {len(packed)} sizes; with compilation {first:.1f} s"
    )
    ways = {
        "population": lambda: ours(packed, of, embed, epochs),
        "torchmil": lambda: torch_loop(torchmils(width, embed), bags, labels, of, epochs),
        "bare PyTorch": lambda: torch_loop(bare(width, embed), bags, labels, of, epochs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.turns):
        for name, way in ways.items():
            seconds[name].append(way())
    own = np.array(seconds["population"])
    # Products of a bag's instances with the weights, forward and, but for the features', backward.
    train = of.parts == TRAIN
    instances = float((train @ np.array([len(bag) for bag in bags])).sum()) * epochs
    flops = instances * 2 * (2 * width * embed[0] + 3 * embed[0] * 256)
    for name, times in seconds.items():
        ratio = np.array(times) / own
        print(
            f"{name:13s} {np.median(times):7.2f} s ({min(times):.2f}-{max(times):.2f}),"
            f" {flops / np.median(times) / 1e9:6.1f} GFLOP/s, / ours {np.median(ratio):.2f}"
            f" ({ratio.min():.2f}-{ratio.max():.2f})"
        )
    if not large:
        print(alone(packed, of, embed, epochs))
    for line in products(width, embed[0]):
        print(line)


def products(width: int, hidden: int) -> list[str]:
    """How fast each library multiplies, alone: what bounds large bags. GFLOP/s of the medians of turns."""
    import jax
    import jax.numpy as jnp
    import torch

    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(s, np.float32) for s in ((2048, width), (width, hidden), (2048, hidden)))  # fmt: skip
    there = [torch.from_numpy(each) for each in (x, w, g)]
    here = [jnp.asarray(each) for each in (x, w, g)]
    forward = jax.jit(lambda x, w, g: x @ w)
    gradient = jax.jit(lambda x, w, g: jnp.einsum("mi,mo->io", x, g))
    ways: dict[str, Any] = {
        "x W, XLA": lambda: forward(*here).block_until_ready(),
        "x W, PyTorch": lambda: there[0] @ there[1],
        "x W, NumPy": lambda: x @ w,
        "its gradient xT g, XLA": lambda: gradient(*here).block_until_ready(),
        "its gradient xT g, PyTorch": lambda: there[0].T @ there[2],
        "its gradient xT g, NumPy": lambda: x.T @ g,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    # In blocks: the threads of a library that has just multiplied stay busy for a while.
    for name, way in [*ways.items()] * 4:
        for repeat in range(15):
            started = time.perf_counter()
            way()
            if repeat >= 5:
                seconds[name].append(time.perf_counter() - started)
    flops = 2 * 2048 * width * hidden
    return [
        f"the product alone, 2048 x {width} x {hidden}, {name}: {flops / np.median(times) / 1e9:.0f} GFLOP/s"
        for name, times in seconds.items()
    ]


if __name__ == "__main__":
    main()
