"""Cuts whole slides, or folders of patches, into fields: ArrayRecord shards of exact µm/px, and tables.

    python -m data_prep.tile --slides DIR|list.csv --out OUT
    python -m data_prep.tile --images DIR --mpp M --out OUT

Of slides: tissue, a grid in µm, regions, pictures. Of patches: every image, or tile of a larger image, is
a field; sub-folders are taken for labels (labels.csv); no regions and no coarser tiles.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from pathme_jax.errors import UserError, launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.tile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--slides", type=Path, help="folder, or CSV with a column wsi (and mpp)")
    source.add_argument(
        "--images", type=Path, help="folder of patches (PNG, JPEG, TIFF), also in sub-folders"
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="output folder; rerun to resume")
    add("--mpp", type=float, help="µm per pixel: of a field (0.5, which is 20x); of the images")
    add("--tile-px", type=int, help="side of a tile (256; of images: their own, if they have one)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes, for images threads")
    add("--dry-run", action="store_true", default=False, help="say what would be done")
    add = parser.add_argument_group("of --slides only").add_argument
    add("--field-px", type=int, help="side of a field, 4 × --tile-px (1024)")
    add("--region-stride", type=int, help="fields from one region to the next (4)")
    add("--min-tissue", type=float, help="share of a tile that must be tissue (0.25)")
    add("--max-upsample", type=float, help="how far a level may be enlarged (1.05)")
    add("--mpp-csv", type=Path, help="CSV wsi,mpp: µm per level-0 pixel of slides without")
    add("--tissue", type=Path, help="folder of <slide>.geojson outlines to use instead of ours")
    args = vars(parser.parse_args(argv))
    dry_run = args.pop("dry_run")

    # late: --help is quick
    if "images" in args:
        from pathme_jax.slides import images

        _check_images(args)
        print((images.preview if dry_run else images.run)(**args))
    else:
        from pathme_jax.slides import preview, tile

        if "tissue" in args:
            args["tissue_dir"] = args.pop("tissue")
        print((preview.preview if dry_run else tile.run)(**args))


def _check_images(args: dict[str, Any]) -> None:
    foreign = args.keys() - {"images", "out", "mpp", "tile_px", "workers"}
    if foreign:
        names = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in foreign))
        raise UserError(f"{names}: of slides, not of --images", "Leave it out")
    if "mpp" not in args:
        raise UserError("--images without --mpp", "Give the images' µm per pixel: 0.5 is 20x")


if __name__ == "__main__":
    main()
