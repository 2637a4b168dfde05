"""Do the encoders learn what they should? Synthetic cohorts, several seeds, each beside random weights.

    python benchmarks/synthetic_cohorts.py --workdir work/bench --seeds 0,1,2

For each seed two cohorts are drawn: encoders train on one, without labels, and are judged on the other.
Printed as a Markdown table for RESULTS.md, and kept in <workdir>/results.json:

- tile probes: logistic regression on frozen features of single tiles, folds by case; `detail` at 20x,
  `architecture` at 5x;
- bags: cross-validated gated ABMIL per task and kind of bag.

"random" is the same pipeline with zero training steps of both encoders.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from pathme_jax.encoders.load import load
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pathme_jax import workflow
from pathme_jax.encoders.extraction import extract_fields
from pathme_jax.encoders.region_extraction import extract_regions
from pathme_jax.files import read_csv, read_json, write_json
from pathme_jax.records.features import read_features
from pathme_jax.records.join import join
from pathme_jax.slides import tile
from pathme_jax.synthetic.cohort import write_cohort
from pathme_jax.training.loop import train

PROBES = (("detail", 1), ("architecture", 4))
TILES = 8  # probed per slide: more of one slide tell little more


def probe(folder: Path, labels: list[dict[str, str]], task: str, seed: int) -> float:
    """Mean AUROC over five folds of cases."""
    rng = np.random.default_rng(seed)
    features, truth, cases = [], [], []
    for row in labels:
        bag = read_features(folder / f"{row['slide_id']}.h5")
        chosen = rng.permutation(len(bag.features))[:TILES]
        features.append(bag.features[chosen])
        truth += [int(row[task])] * len(chosen)
        cases += [row["case_id"]] * len(chosen)
    x, y = np.concatenate(features), np.array(truth)
    scores = []
    for fit, test in StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(x, y, cases):
        if len(set(y[test])) == 2:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            scores.append(
                roc_auc_score(y[test], model.fit(x[fit], y[fit]).decision_function(x[test]))
            )
    return float(np.mean(scores))


def encoders(work: Path, grid: Path, settings: workflow.Settings) -> tuple[Path, Path]:
    """Both encoders, trained on one cohort."""
    config = workflow.patch_config(settings, grid)
    patch = train(config, workflow.workdir_of(work, "patch", config))
    extract_fields(grid, [patch, workflow.EXPERT, "mean_rgb"])
    name = load(patch).name
    regions = join(grid, [(name, 1), (name, 4), (workflow.EXPERT, 1)])
    config = workflow.region_config(settings, name, regions.folder)
    return patch, train(config, workflow.workdir_of(work, "region", config))


def judge(
    work: Path, grid: Path, labels: Path, patch: Path, region: Path, settings: workflow.Settings
) -> dict[str, Any]:
    """Probes and bags of one pair of encoders on a cohort they have not seen."""
    tiles = extract_fields(grid, [patch, workflow.EXPERT, "mean_rgb"])
    name = load(patch).name
    regions = join(grid, [(name, 1), (name, 4), (workflow.EXPERT, 1)])
    tokens = extract_regions(regions.folder, region)
    bags = workflow.bags_of(settings, name, tiles, tokens)
    results = workflow.classify(
        settings, grid, bags, labels, workflow.TASKS, work / "mil", shuffles=0
    )
    rows = read_csv(labels)
    return {
        "probes": {
            task: probe(tiles.folders[name, settings.mpp * k], rows, task, settings.seed)
            for task, k in PROBES
        },
        "bags": {
            task: {bag: row["rows"]["head"]["auroc"] for bag, row in by_bag.items()}
            for task, by_bag in results.items()
        },
    }


def run(work: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    grids = {}
    for role, cohort_seed, slides in (
        ("train", 100 + seed, args.train),
        ("test", 200 + seed, args.test),
    ):
        cohort = write_cohort(work / role, slides=slides, seed=cohort_seed)
        grids[role] = tile.run(cohort / "slides", work / f"{role}-tiles").grid_dir
    found = {}
    # Random encoders need no training cohort; their inputs' widths are all that counts.
    for kind, patch_steps, region_steps in (
        ("trained", args.patch_steps, args.region_steps),
        ("random", 0, 0),
    ):
        settings = workflow.Settings(seed=seed, patch_steps=patch_steps, region_steps=region_steps)
        grid = grids["train" if patch_steps else "test"]
        pair = encoders(work / "runs", grid, settings)
        labels = work / "test" / "labels.csv"
        found[kind] = judge(work / kind, grids["test"], labels, *pair, settings)
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Mean over seeds with each seed's value."""

    def cell(values: list[float]) -> str:
        return f"{np.mean(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"

    seeds = list(results.values())
    lines = ["| what | trained | random init |", "|---|---|---|"]
    for task, k in PROBES:
        cells = [cell([s[kind]["probes"][task] for s in seeds]) for kind in ("trained", "random")]
        lines.append(f"| tile probe of {task}, {20 // k}x | {cells[0]} | {cells[1]} |")
    for task in workflow.TASKS:
        for bag in seeds[0]["trained"]["bags"][task]:
            cells = [
                cell([s[kind]["bags"][task][bag] for s in seeds]) for kind in ("trained", "random")
            ]
            lines.append(f"| {task}, {bag} bag | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("work/bench"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train", type=int, default=16, help="slides the encoders train on")
    parser.add_argument("--test", type=int, default=32, help="slides they are judged on")
    parser.add_argument("--patch-steps", type=int, default=workflow.Settings.patch_steps)
    parser.add_argument("--region-steps", type=int, default=workflow.Settings.region_steps)
    args = parser.parse_args()
    path = args.workdir / "results.json"
    results = read_json(path) if path.exists() else {}
    for seed in args.seeds.split(","):
        if seed not in results:
            results[seed] = run(args.workdir / f"seed-{seed}", int(seed), args)
            write_json(path, results)
    print(table(results))


if __name__ == "__main__":
    main()
