"""Joins extracted features into regions: what PatHME trains on.

    python -m data_prep.regions --grid OUT/20x-… --fine ENC --coarse ENC [--experts hed_texture,…]

joins features that pathme_jax.extract wrote beside the fields; encoders are given by name.

    python -m data_prep.regions --out OUT --fine T/20x_256px_0px_overlap/features_uni_v1 \\
        --coarse T/5x_256px_0px_overlap/features_uni_v1 [--experts DIR,…]

joins folders that TRIDENT wrote, with any encoder; coarse at a quarter of fine's magnification.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pathme_jax.errors import UserError, launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="data_prep.regions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--grid", type=Path, help="what data_prep.tile wrote; with encoders' names")
    where.add_argument("--out", type=Path, help="new or old folder; with feature folders")
    add = parser.add_argument
    add("--fine", required=True, metavar="ENC|DIR", help="encoder at the fields' mpp")
    add("--coarse", metavar="ENC|DIR", help="encoder at 4 x that (by name: as --fine)")
    add("--experts", default="", metavar="ENC|DIR[,…]", help="experts for MEKD, as --fine")
    args = parser.parse_args(argv)

    experts = [name for name in args.experts.split(",") if name]
    if args.grid:
        from pathme_jax.records.join import join

        columns = [(args.fine, 1), (args.coarse or args.fine, 4), *((name, 1) for name in experts)]
        joined = join(args.grid, columns)
    else:
        from pathme_jax.records.foreign import join_folders

        if not args.coarse:
            raise UserError("--out without --coarse", "Give the folder of coarse features, too")
        joined = join_folders(args.fine, args.coarse, experts, args.out)
    print(f"{joined.folder}\n{joined.regions} regions, {len(joined.errors)} slides left out")
    for error in joined.errors:
        print(f"  {error['slide_id']}: {error['reason']}. {error['cure']}")


if __name__ == "__main__":
    main()
