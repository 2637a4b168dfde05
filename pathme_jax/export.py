"""An encoder for others: Flax, timm, transformers and StableHLO, with a model card.

    python -m pathme_jax.export --encoder runs/dinov2/best --out exported --licence Apache-2.0
    python -m pathme_jax.export --encoder encoders/uni --out exported --formats timm,stablehlo

Takes the folder of `pathme_jax.convert`, a finished run's --workdir or its `best`. Formats that are there
stay; the card (README.md) names teachers whose licences restrict use, and so does a line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pathme_jax.errors import launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pathme_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--encoder", required=True, metavar="PATH", help="a folder, see above")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--formats",
        default="",
        metavar="F[,F…]",
        help="of flax, timm, transformers, stablehlo (default: all that can tell this encoder)",
    )
    parser.add_argument(
        "--tile-px",
        type=int,
        default=0,
        metavar="PX",
        help="side of the tiles it will be given (default: that in the encoder's definition)",
    )
    parser.add_argument(
        "--licence", default="", metavar="SPDX", help="of the exported weights, for the card"
    )
    args = parser.parse_args(argv)

    from pathme_jax.encoders import exporting

    formats = [name for name in args.formats.split(",") if name]
    done = exporting.export(
        args.encoder, args.out, formats=formats, tile_px=args.tile_px, licence=args.licence
    )
    for line in done.warnings:
        print(f"warning: made from {line}", file=sys.stderr)
    for name in done.written:
        print(args.out / name)
    for name in done.found:
        print(f"{args.out / name} was there")
    for name, why in done.left_out.items():
        print(f"no {name}: {why}")
    print(f"card: {args.out / 'README.md'}")


if __name__ == "__main__":
    main()
