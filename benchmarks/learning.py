"""Does DINOv2 learn? Probes of the teacher before and after training, over seeds.

    python benchmarks/learning.py --workdir W --seeds 0,1,2 [--real ../shared/data] [--steps 400]

Synthetic: encoders train without labels on 136 slides (over 2,000 fields) of one cohort; kNN and linear
probes of `detail` use 8 tiles each of 64 slides of another, folds by case. "random" is the same encoder
before its first step, "mean colour" the same probes on three numbers a tile.
Real: trained on the fields of the real slides; the probe says which slide's organ a tile is from, with
fields, not cases, apart: one case an organ allows no more, and recognising a slide's stain is enough.

Run again, it goes on; what is finished is only read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from configs.dinov2_tiny import get_config
from pathme_jax.slides import tile
from pathme_jax.synthetic.cohort import write_cohort
from pathme_jax.training.loop import train
from pathme_jax.training.watch import curves, read_log

SCORES = ("knn_accuracy", "knn_auroc", "linear_accuracy", "linear_auroc")


def fields(work: Path, name: str, slides: int, seed: int) -> tuple[Path, Path]:
    """(tiled folder, labels.csv) of a synthetic cohort."""
    cohort = work / name
    if not (cohort / "labels.csv").exists():
        write_cohort(cohort, slides=slides, size=4096, seed=seed, slides_per_case=2, workers=2)
    grid = tile.run(cohort / "slides", work / f"tiles-{name}", workers=2).grid_dir
    return grid, cohort / "labels.csv"


def config_for(grid: Path, seed: int, steps: int, **probe: Any) -> Any:
    config = get_config()
    config.seed, config.steps = seed, steps
    config.data.path = str(grid)
    config.loss.temperature_warmup = steps
    config.probe.update(every=max(steps // 4, 1), **probe)
    config.checkpoint.every = 50
    return config


def scores(workdir: Path) -> dict[str, list[float]]:
    """Random, trained and mean-colour values of every score; usage of prototypes, first and last."""
    rows = read_log(workdir / "metrics.jsonl")
    probed = [row for row in rows if any(k.endswith("/chance") for k in row)]
    name = next(k for k in probed[-1] if k.endswith("/chance")).removesuffix("/chance")
    found = {
        score: [
            probed[0][f"{name}/{score}"],
            probed[-1][f"{name}/{score}"],
            probed[0][f"{name}/mean_rgb/{score}"],
        ]
        for score in SCORES
    }
    used = [row["prototype_usage"] for row in rows if "prototype_usage" in row]
    found["prototype_usage"] = [used[0], used[-1], float("nan")]
    return found


def table(title: str, runs: list[dict[str, list[float]]]) -> str:
    lines = [f"\n{title}\n", "| | random | trained | mean colour |", "|---|---|---|---|"]
    for score in runs[0]:
        cells = []
        for column in range(3):
            values = [run[score][column] for run in runs]
            each = ", ".join(f"{v:.2f}" for v in values)
            cells.append("" if np.isnan(values[0]) else f"{np.mean(values):.2f} ({each})")
        lines.append(f"| {score} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--real", type=Path, help="folder with slides/ and labels.csv")
    arguments = parser.parse_args()
    work, seeds = arguments.workdir, [int(s) for s in arguments.seeds.split(",")]
    grid, _ = fields(work, "train", 136, 300)
    other, labels = fields(work, "probe", 64, 400)
    runs = []
    for seed in seeds:
        probe = dict(path=str(other), labels=str(labels), column="detail")
        config = config_for(grid, seed, arguments.steps, **probe)
        run = train(config, work / f"synthetic-{arguments.steps}-{seed}")
        curves(run)
        runs.append(scores(run))
    print(table(f"detail, synthetic, {arguments.steps} steps, seeds {arguments.seeds}", runs))
    results = {"synthetic": runs}
    if arguments.real:
        real = tile.run(arguments.real / "slides", work / "tiles-real", workers=2).grid_dir
        real_labels = arguments.real / "labels.csv"
        runs = []
        for seed in seeds:
            probe = dict(path=str(real), labels=str(real_labels), column="organ", split="tile")
            probe |= dict(tiles=32)
            config = config_for(real, seed, arguments.steps, **probe)
            run = train(config, work / f"real-{arguments.steps}-{seed}")
            runs.append(scores(run))
        print(table(f"tile to organ, real slides, {arguments.steps} steps", runs))
        results["real"] = runs
    (work / "learning.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
