"""Judges frozen features by a published protocol: `python -m pathme_jax.evaluate --help`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pathme_jax.errors import launcher

PROTOCOLS = ("uni", "eva", "patho-bench", "gpfm")  # evaluation.protocols, which imports JAX


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pathme_jax.evaluate",
        description="Linear probe, kNN, few-shot and retrieval on frozen features, in patient-grouped folds.",
    )
    parser.add_argument(
        "--features",
        type=Path,
        nargs="+",
        required=True,
        help="folders of feature files; the further ones are compared with the first on the same slides and folds",
    )
    parser.add_argument("--labels", type=Path, required=True, help="CSV case_id,slide_id,<task>")
    parser.add_argument("--task", required=True, help="label column")
    parser.add_argument(
        "--out", type=Path, required=True, help="gets <task>/<protocol>-<level>-<hash>/"
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="uni",
        help="see evaluation/protocols.py (default: uni)",
    )
    parser.add_argument(
        "--level",
        choices=("slide", "tile"),
        default="slide",
        help="what is classified: the mean of a slide's tiles, or each tile by its slide's label (default: slide)",
    )
    parser.add_argument(
        "--tiles-per-slide", type=int, default=100, help="random tiles at level tile (default: 100)"
    )
    parser.add_argument(
        "--folds",
        type=int,
        default=5,
        help="fewer if the smallest class has fewer cases (default: 5)",
    )
    parser.add_argument(
        "--fold-column-prefix",
        default="fold_",
        help="the user's fold columns in the labels; '' ignores",
    )
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap (default: 1000)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of folds, probes and draws (default: 0)"
    )
    return parser


@launcher
def main(argv: list[str] | None = None) -> None:
    arguments = vars(_parser().parse_args(argv))
    from pathme_jax.evaluation.frozen import SHOWN, run, table_rows

    found = run(**arguments)
    for row in table_rows(found["features"]):
        if row["metric"] in SHOWN:
            spread = f"{_number(row['low'])}–{_number(row['high'])}"
            told = f"{row['metric']:18} {_number(row['value'])}  95 % {spread}"
            print(f"{row['features']:20} {row['probe']:12} {told}")
    for pair, probes in found["comparison"].items():
        for probe, value in probes.items():
            low, high = value["interval"]
            print(
                f"{pair}  {probe}: AUROC {_number(value['difference'])} (95 % {_number(low)} to {_number(high)}),"
                f" permutation p {_number(value['permutation_p'])}"
            )
    for note in found["notes"]:
        print(note)
    for name, problems in found["problems"].items():
        for problem in problems:
            print(f"{name}: left out {problem['slide_id']}: {problem['reason']}. {problem['cure']}")
    print(found["folder"])


def _number(value: Any) -> str:
    return "none" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
