"""The page of a slide-level run, its figures and its attention for QuPath: `python -m pathme_jax.report --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pathme_jax.errors import launcher


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pathme_jax.report",
        description="Writes RUN/report.html, RUN/figures (PNG, SVG) and RUN/qupath (GeoJSON) of a slide-level run.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder that mil_train named at its end"
    )
    parser.add_argument(
        "--thumbnails", type=Path, metavar="DIR", help="<slide_id>.jpg or .png, under the heatmaps"
    )
    parser.add_argument(
        "--slides", type=Path, metavar="DIR", help="whole slides (or a CSV of them), for the top tiles"
    )  # fmt: skip
    return parser


@launcher
def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    from pathme_jax.reports import slide_level  # matplotlib is slow to import

    page = slide_level.write(arguments.run, arguments.thumbnails, arguments.slides)
    print(f"report: {page.resolve()}")


if __name__ == "__main__":
    main()
