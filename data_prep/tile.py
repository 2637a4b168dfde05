"""Cuts whole slides into fields: tissue, exact µm/px grid, ArrayRecord shards, pictures, tables.

python -m data_prep.tile --slides DIR|list.csv --out OUT
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pathme_jax.errors import launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.tile", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    add = parser.add_argument
    add("--slides", type=Path, required=True, help="folder, or CSV with a column wsi (and mpp)")
    add("--out", type=Path, required=True, help="output folder; rerun to resume")
    add("--mpp", type=float, default=0.5, help="µm per pixel of a field (0.5 is 20x)")
    add("--field-px", type=int, default=1024, help="side of a field, 4 × --tile-px")
    add("--tile-px", type=int, default=256, help="side of a tile")
    add("--region-stride", type=int, default=4, help="fields from one region to the next")
    add("--min-tissue", type=float, default=0.25, help="share of a tile that must be tissue")
    add("--max-upsample", type=float, default=1.05, help="how far a level may be enlarged")
    add("--mpp-csv", type=Path, help="CSV wsi,mpp: µm per level-0 pixel of slides without")
    add("--tissue", type=Path, help="folder of <slide>.geojson outlines to use instead of ours")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    add("--dry-run", action="store_true", help="say what would be done, write nothing")
    args = vars(parser.parse_args(argv))
    dry_run, tissue_dir = args.pop("dry_run"), args.pop("tissue")

    from pathme_jax.slides import preview, tile  # late: --help is quick

    if dry_run:
        print(preview.preview(tissue_dir=tissue_dir, **args))
    else:
        print(tile.run(tissue_dir=tissue_dir, **args))


if __name__ == "__main__":
    main()
