"""Joins extracted features into regions: what PatHME trains on.

python -m data_prep.regions --grid OUT/20x-… --fine ENC --coarse ENC [--experts hed_texture,…]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pathme_jax.errors import launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="data_prep.regions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--grid", type=Path, required=True, help="what data_prep.tile wrote")
    parser.add_argument("--fine", required=True, metavar="ENC", help="encoder at the fields' mpp")
    parser.add_argument("--coarse", metavar="ENC", help="encoder at 4 x that (default: --fine)")
    parser.add_argument("--experts", default="", metavar="ENC[,ENC…]", help="experts for MEKD")
    args = parser.parse_args(argv)

    from pathme_jax.records.join import join

    columns = [(args.fine, 1), (args.coarse or args.fine, 4)]
    columns += [(name, 1) for name in args.experts.split(",") if name]
    joined = join(args.grid, columns)
    print(f"{joined.folder}\n{joined.regions} regions, {len(joined.errors)} slides left out")
    for error in joined.errors:
        print(f"  {error['slide_id']}: {error['reason']}. {error['cure']}")


if __name__ == "__main__":
    main()
