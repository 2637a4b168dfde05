"""How the time of a cross-validation grows in folds, seeds and bag size: the population beside a bare PyTorch loop.

    python benchmarks/mil_growth.py --out docs/mil_growth.png         # in an environment with torch

Gated ABMIL of 256 hidden units on 20 bags of width 512, one epoch, compilation left out. One quantity varies at a time
around 5 folds, 3 seeds and bags of 400 instances.
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pathme_jax.mil import buckets, population
from pathme_jax.mil.folds import TEST, TRAIN

AROUND = {"folds": 5, "seeds": 3, "instances": 400}
SWEEPS = {"folds": (2, 5, 10), "seeds": (1, 3, 10, 20), "instances": (50, 200, 800, 3200)}
BAGS, WIDTH, HIDDEN = 20, 512, 256
SPEED: Any = runpy.run_path(str(Path(__file__).with_name("mil_speed.py")))


def members(folds: int, seeds: int) -> population.Members:
    each = np.arange(folds * seeds)
    parts = np.where(np.arange(BAGS) % folds == each[:, None] // seeds, TEST, TRAIN)
    labels = np.arange(BAGS) // (BAGS // 2)
    return population.Members(
        parts=parts,
        targets=np.tile(labels.astype(np.float32), (len(each), 1))[..., None],
        weights=(parts == TRAIN).astype(np.float32)[..., None],
        seeds=each % seeds,
        rates=np.full(len(each), 1e-4),
        decays=np.full(len(each), 1e-5),
    )


def seconds(folds: int, seeds: int, instances: int) -> tuple[float, float]:
    """Of the population and of the loop: the better of two."""
    rng = np.random.default_rng(0)
    bags = [rng.standard_normal((instances, WIDTH), np.float32) for _ in range(BAGS)]
    of, packed = members(folds, seeds), buckets.pack(bags)
    labels = np.arange(BAGS) // (BAGS // 2)
    SPEED["ours"](packed, of, (HIDDEN,), 1)
    own = min(SPEED["ours"](packed, of, (HIDDEN,), 1) for _ in range(2))
    make = SPEED["bare"](WIDTH, (HIDDEN,))
    loop = min(SPEED["torch_loop"](make, bags, labels, of, 1) for _ in range(2))
    return own, loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, 3), SWEEPS.items(), strict=True):
        found = np.array([seconds(**(AROUND | {name: value})) for value in values])
        for value, (own, loop) in zip(values, found, strict=True):
            print(f"{name} {value}: population {own:.2f} s, loop {loop:.2f} s, x {loop / own:.2f}")
        axes.loglog(values, found[:, 0], "o-", color="#1b6ca8", label="population")
        axes.loglog(values, found[:, 1], "s--", color="#c8552b", label="PyTorch, one by one")
        axes.set_xticks(values, map(str, values))
        axes.minorticks_off()
        axes.set_xlabel({"instances": "instances a bag"}.get(name, name))
        axes.grid(color="#d5dadf", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        for value, (own, loop) in zip(values, found, strict=True):
            axes.annotate(f"{loop / own:.1f} x", (value, own), (0, -14), textcoords="offset points",
                          ha="center", fontsize=8)  # fmt: skip
        axes.margins(0.12, 0.2)
    figure.axes[0].set_ylabel("seconds an epoch")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(args.out, dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    main()
