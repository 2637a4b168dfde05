"""Features of every slide with a fixed or trained encoder, as HDF5 in TRIDENT's layout.

    python -m pathme_jax.extract --encoder runs/dinov2,hed_texture --fields OUT/20x-…
    python -m pathme_jax.extract --encoder runs/pathme --regions OUT/20x-…/regions-…

Output goes beside the fields: <grid>/20x_256px_0px_overlap/features_<encoder>/<slide>.h5. What is
there under the same recipe is skipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pathme_jax.errors import launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pathme_jax.extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--encoder",
        required=True,
        metavar="A[,B…]",
        help="hed_texture, mean_rgb, or the --workdir of a finished training run",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--fields", type=Path, metavar="GRID", help="for patch encoders")
    source.add_argument("--regions", type=Path, metavar="DIR", help="for region encoders")
    parser.add_argument(
        "--multiples",
        default="1,4,16",
        metavar="K[,K…]",
        help="magnifications, as multiples of the fields' µm/px: 1, 4, 16 (20x, 5x, 1.25x at 0.5)",
    )
    parser.add_argument("--batch", type=int, default=64, help="tiles encoded at once (default 64)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be encoded")
    args = parser.parse_args(argv)

    from pathme_jax.encoders import extraction

    encoders = args.encoder.split(",")
    if args.dry_run:
        print(extraction.describe(args.fields or args.regions, encoders))
        return
    if args.fields:
        multiples = extraction.parse_multiples(args.multiples)
        done = extraction.extract_fields(
            args.fields, encoders, multiples=multiples, batch=args.batch
        )
    else:
        done = extraction.extract_regions(args.regions, encoders[0])
    for path in done.folders.values():
        print(path)
    print(f"{done.done} slides encoded, {done.skipped} were done, {len(done.errors)} failed")
    for error in done.errors:
        print(f"  {error['slide_id']}: {error['reason']}. {error['cure']}")


if __name__ == "__main__":
    main()
