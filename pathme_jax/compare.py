"""Compares two slide-level runs patient by patient: `python -m pathme_jax.compare RUN/TASK RUN/TASK`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pathme_jax.errors import launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pathme_jax.compare",
        description="What the second run gains over the first, on the same patients and folds.",
    )
    parser.add_argument("first", type=Path, help="<run>/<task> of mil_train")
    parser.add_argument("second", type=Path, help="the same task of another run")
    parser.add_argument("--draws", type=int, default=1000, help="of bootstrap and permutation")
    arguments = parser.parse_args(argv)
    from pathme_jax.mil.comparison import compare

    found = compare(arguments.first, arguments.second, draws=arguments.draws)
    low, high = found["interval"]
    print(f"{found['measure']} {found['first']} -> {found['second']}, {found['cases']} patients")
    print(f"difference {found['difference']:+}  95 % interval {low} to {high}")
    print(f"p {found['permutation_p']} by permutation, {found['bootstrap_p']} by bootstrap")


if __name__ == "__main__":
    main()
