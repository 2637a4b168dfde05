"""Cross-validates slide-level heads on feature files: `python -m pathme_jax.mil_train --help`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from pathme_jax.errors import launcher
from pathme_jax.mil.settings import Settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pathme_jax.mil_train",
        description="Slide-level heads, patient-grouped cross-validation, and the controls beside it.",
    )
    parser.add_argument("--features", type=Path, required=True, help="folder of feature files")
    parser.add_argument("--parent-features", type=Path, help="features at 4 x the mpp, joined on")
    parser.add_argument("--labels", type=Path, required=True, help="CSV case_id,slide_id,<task>")
    parser.add_argument(
        "--task",
        required=True,
        help="[kind:]column, several with commas: grade, labels:er+pr, number:hrd, nll:os, cox:os",
    )
    parser.add_argument("--out", type=Path, required=True, help="gets <name>-<hash>/<task>/")
    parser.add_argument("--classes", default="", help="of the task, in order; default: those found")
    parser.add_argument("--splits", type=Path, help="split files instead of fold columns")
    parser.add_argument("--colour", type=Path, help="CSV slide_id,r,g,b for the mean-colour row")
    parser.add_argument("--thumbnails", type=Path, help="<slide>.jpg, under the report's heatmaps")
    parser.add_argument("--slides", type=Path, help="whole slides, for the report's top tiles")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--name", help="of the bags; default: the feature folder's")
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            choices=("slide", "case") if field.name == "bag" else None,
            help=f"{field.metadata['help']} (default: {field.default!r})",
        )
    return parser


@launcher
def main(argv: list[str] | None = None) -> None:
    arguments = vars(_parser().parse_args(argv))
    shown = {name: arguments.pop(name) for name in ("thumbnails", "slides")}
    from pathme_jax.mil.run import run
    from pathme_jax.reports import slide_level

    found = run(parent=arguments.pop("parent_features"), **arguments)
    if arguments["dry_run"]:
        return
    for task, content in found.items():
        for row, values in content["rows"].items():
            label = content["head"] if row == "head" else row
            measured = f"{content['measure']} {values[content['measure']]}"
            print(f"{task}: {label:12} {measured}  95 % interval {values['interval']}")
        if content["too_few_to_judge"]:
            print(f"{task}: {content['cases']} cases: too few to judge")
    content = next(iter(found.values()))
    for problem in content["problems"]:
        print(f"left out {problem['slide_id']}: {problem['reason']}. {problem['cure']}")
    folder = Path(content["folder"]).parent
    if not (folder / "report.html").exists():
        slide_level.write(folder, **shown)
    print(f"report: {folder / 'report.html'}")
    print(folder)


if __name__ == "__main__":
    main()
