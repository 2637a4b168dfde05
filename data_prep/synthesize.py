"""Writes a cohort of synthetic slides whose truth is known.

    python -m data_prep.synthesize --out DIR [--slides 40 --size 4096 --seed 0]

DIR/slides/*.tiff are pyramids at 0.5 µm/px; DIR/labels.csv says what is in them: `detail` (chromatin,
seen at 20x only), `architecture` (layout, seen at 5x), `subtype` (their XOR), survival.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pathme_jax.errors import launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.synthesize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the cohort")
    parser.add_argument("--slides", type=int, default=40, help="how many (40)")
    parser.add_argument("--size", type=int, default=4096, help="px, a multiple of 1024 (4096)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another cohort (0)")
    parser.add_argument("--slides-per-case", type=int, default=2, help="slides of one patient (2)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    arguments = parser.parse_args(argv)

    from pathme_jax.synthetic.cohort import write_cohort  # late: --help must be quick

    out = write_cohort(**vars(arguments))
    print(f"{arguments.slides} slides in {out / 'slides'}, labels in {out / 'labels.csv'}")


if __name__ == "__main__":
    main()
