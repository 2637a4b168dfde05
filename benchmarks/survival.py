"""Survival on synthetic slides: is the planted order of hazards recovered, and not from shuffled times?

    python benchmarks/survival.py [--cases 160] [--workdir DIR]

Every case has one slide; each of its two labels that is 1 multiplies an exponential hazard by 2.2, and follow-up is
censored (see `synthetic/cohort.py`). Tiles are encoded without training (colour deconvolution and texture), heads are
cross-validated with both losses, and the row "shuffled" learned and is judged on times dealt to other patients. The
truth itself, the number of labels, says how high a C-index can be.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from pathme_jax.encoders.extraction import extract_fields
from pathme_jax.evaluation.intervals import bootstrap_weights, interval
from pathme_jax.evaluation.survival import concordance
from pathme_jax.files import read_csv
from pathme_jax.mil.run import run
from pathme_jax.slides import tile
from pathme_jax.synthetic.cohort import write_cohort


def oracle(labels: Path) -> tuple[float, tuple[float, float]]:
    """C-index of the planted log hazard, and its interval over patients."""
    rows = read_csv(labels)
    risk, time_, event = (
        np.array([f(row) for row in rows], float)
        for f in (
            lambda row: int(row["detail"]) + int(row["architecture"]),
            lambda row: float(row["os_months"]),
            lambda row: int(row["os_event"]),
        )
    )
    weights = bootstrap_weights(np.array([row["case_id"] for row in rows]), event)
    drawn = np.asarray(concordance(risk, time_, event, None, weights))
    return float(np.asarray(concordance(risk, time_, event))), interval(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=160)
    parser.add_argument("--size", type=int, default=2048, help="side of a slide in px")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--seeds", type=int, default=3, help="heads a fold")
    parser.add_argument("--workdir", type=Path)
    args = parser.parse_args()
    home = args.workdir or Path(tempfile.mkdtemp())
    cohort = write_cohort(
        home / "cohort", slides=args.cases, size=args.size, seed=args.seed, slides_per_case=1
    )
    tiled = tile.run(cohort / "slides", home / "tiles", workers=2)
    made = extract_fields(tiled.grid_dir, ["hed_texture"])
    fine = made.folders["hed_texture", 0.5]
    c, (low, high) = oracle(cohort / "labels.csv")
    print(f"{args.cases} cases; C-index of the planted hazard {c:.3f} ({low:.3f} to {high:.3f})")
    for spec in ("nll:os", "cox:os"):
        started = time.perf_counter()
        found = run(
            fine,
            cohort / "labels.csv",
            spec,
            home / "mil",
            batch=16,
            epochs=40,
            seeds=args.seeds,
            shuffles=5,
            learning_rate=2e-3,
        )["os"]
        print(f"{spec}: {found['events']} events, {time.perf_counter() - started:.0f} s")
        for row, values in found["rows"].items():
            low, high = values["interval"]
            print(
                f"  {row:10s} C-index {values['c_index']:.3f} ({low:.3f} to {high:.3f}),"
                f" log-rank p {values['logrank_p']:.4f}, permutation p {values['permutation_p']:.4f}"
            )
    print(f"{home}")


if __name__ == "__main__":
    main()
