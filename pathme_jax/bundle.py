"""All that predicts a new slide in one folder: the heads of a MIL run, their encoder, the tiling, when to abstain.

    python -m pathme_jax.bundle --run OUT/20x-1a2b3c4d --encoder encoders/uni --out bundles/mine
    python -m pathme_jax.predict slide.svs --bundle bundles/mine

Research use only. The bundle holds no patient's or slide's name; it does hold the encoder's weights, whose licence
may not allow that you pass them on: a line on stderr says so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pathme_jax.errors import launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pathme_jax.bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="what pathme_jax.mil_train wrote")
    add(
        "--encoder",
        required=True,
        metavar="DIR",
        help="the encoder of its features: a folder of convert or export, a finished run's --workdir,"
        " or hed_texture, mean_rgb",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the bundle")
    add(
        "--accuracy",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of the cases not abstained on that are to be right (default 0.9)",
    )
    args = parser.parse_args(argv)

    from pathme_jax.mil import bundle

    made = bundle.make(args.run, args.encoder, args.out, args.accuracy)
    for warning in made.about["encoder"]["warnings"]:
        print(f"warning: holds weights made from {warning}", file=sys.stderr)
    for name, task in made.about["tasks"].items():
        for line in _lines(name, task):
            print(line)
    print(made.about["use"])
    print(made.folder)


def _lines(name: str, task: dict[str, Any]) -> list[str]:
    """What to expect of a task's predictions."""
    rule, kind = task["rule"], task["kind"]
    if kind == "classes":
        found = [f"{name}: {_said(rule)}"]
    elif kind == "labels":
        found = [f"{name}, {label}: {_said(each)}" for label, each in rule.items()]
    elif kind == "number":
        known = rule["interval"] is not None
        width = f"± {rule['interval']:.4g}" if known else "unknown, too few"
        found = [f"{name}: {rule['level']:.0%} interval {width} ({rule['cases']} cases)"]
    else:
        found = [f"{name}: risks as percentiles of those of {rule['cases']} cases"]
    if task["too_few_to_judge"]:
        found.append(f"{name}: {task.get('cases', '?')} cases are too few to judge")
    return found


def _said(rule: dict[str, Any]) -> str:
    if rule["threshold"] is None:
        return (
            f"always abstains: no confidence at which {rule['accuracy']:.0%} of {rule['cases']} cases are"
            " right (predict --threshold overrides)"
        )
    return (
        f"abstains below {rule['threshold']:.3g}; of the {rule['kept']:.0%} of {rule['cases']} cases at or"
        f" above, {rule['right']:.0%} are right (95 % interval from {rule['right_at_least']:.0%})"
    )


if __name__ == "__main__":
    main()
