"""Slides to a slide-level report in one command.

    python -m pathme_jax.demo                                         synthetic slides, about ten minutes
    python -m pathme_jax.demo --slides DIR --labels CSV --task label  your own

Rerun the same command to resume; what is done is not done again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pathme_jax.errors import launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pathme_jax.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir", type=Path, default=Path("work/demo"), help="default: work/demo"
    )
    parser.add_argument("--slides", type=Path, help="folder or CSV of whole slides")
    parser.add_argument("--labels", type=Path, help="CSV: case_id, slide_id and label columns")
    parser.add_argument(
        "--task",
        metavar="COL[,COL…]",
        help="label columns to learn; of synthetic slides detail, architecture, subtype",
    )
    parser.add_argument(
        "--mpp", type=float, default=0.5, help="finest µm/px (default 0.5, i.e. 20x)"
    )
    parser.add_argument(
        "--mpp-csv", type=Path, help="CSV wsi,mpp of slides that do not state their µm/px"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that draw and tile slides"
    )
    parser.add_argument("--cohort", type=int, default=40, help="synthetic slides (default 40)")
    parser.add_argument("--patch-steps", type=int, help="training steps of the patch encoder")
    parser.add_argument("--region-steps", type=int, help="training steps of the region encoder")
    args = parser.parse_args(argv)

    from pathme_jax import workflow

    steps = {k: v for k in ("patch_steps", "region_steps") if (v := getattr(args, k)) is not None}
    settings = workflow.Settings(
        cohort=args.cohort, mpp=args.mpp, seed=args.seed, workers=args.workers, **steps
    )
    report = workflow.run(
        args.workdir,
        settings,
        slides=args.slides,
        labels=args.labels,
        tasks=tuple(args.task.split(",")) if args.task else (),
        mpp_csv=args.mpp_csv,
    )
    print(f"report: {report.resolve()}")


if __name__ == "__main__":
    main()
