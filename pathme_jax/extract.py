"""Features of every slide with fixed, public or trained encoders, as HDF5 in TRIDENT's layout.

    python -m pathme_jax.extract --encoder encoders/uni,encoders/virchow2 --slides DIR --out OUT
    python -m pathme_jax.extract --encoder runs/dinov2,hed_texture --fields OUT/20x-…
    python -m pathme_jax.extract --encoder runs/pathme --regions OUT/20x-…/regions-…

Each tile is read once and goes through every encoder. Output goes to
<grid>/20x_256px_0px_overlap/features_<encoder>/<slide>.h5, where <grid> is OUT/20x-<recipe> for slides, else
the folder that was given. What is there under the same recipe is skipped; several processes may share a
folder. Outcome and time of each slide: <grid>/extraction.csv.
"""

from __future__ import annotations

import argparse

from pathme_jax.errors import UserError, launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pathme_jax.extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--encoder",
        required=True,
        metavar="A[,B…]",
        help="hed_texture, mean_rgb; a folder that pathme_jax.convert or pathme_jax.export wrote; or the"
        " --workdir of a finished training run",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--slides", metavar="DIR|CSV", help="slides, read without storing pixels")
    source.add_argument("--fields", metavar="GRID", help="what data_prep.tile wrote")
    source.add_argument("--regions", metavar="DIR", help="what data_prep.regions wrote")
    add("--out", metavar="DIR", help="needed with --slides; else beside the fields or regions")
    add(
        "--mpp",
        metavar="M[,M…]",
        help="µm/px of the tiles, the finest and 4 or 16 times it (default 0.5,2,8: 20x, 5x, 1.25x; of"
        " fields, their own and its multiples)",
    )
    add("--tile-px", type=int, help="side of a tile cut from slides (default 256)")
    add("--dtype", default="float16", help="of stored features, float16 (default) or float32")
    add("--precision", help="of computation: float32 (default on a CPU) or bfloat16 (else)")
    add("--batch", type=int, help="tiles at once (default 32 on a CPU, else 256 a device)")
    add("--workers", type=int, help="processes that read (default: a core each; on a CPU threads)")
    add("--mpp-csv", metavar="FILE", help="wsi,mpp: µm per level-0 pixel of slides without")
    add("--tissue", metavar="DIR", help="<slide>.geojson outlines to use instead of ours")
    add("--dry-run", action="store_true", help="say what would be done, write nothing")
    args = parser.parse_args(argv)
    if args.slides and not args.out:
        parser.error("--slides needs --out")
    if not args.slides and (args.tile_px or args.mpp_csv or args.tissue):
        parser.error("--tile-px, --mpp-csv and --tissue belong to --slides")

    encoders = args.encoder.split(",")
    if args.regions:
        print(_regions(args, encoders))
    else:
        print(_tiles(args, encoders))


def _tiles(args: argparse.Namespace, names: list[str]) -> object:
    from pathme_jax.data.stores import FieldStore
    from pathme_jax.encoders import extraction
    from pathme_jax.encoders.encoder import load

    mpps = extraction.parse_mpps(args.mpp) if args.mpp else None
    how = {name: getattr(args, name) for name in ("dtype", "precision", "batch", "workers")}
    precision = extraction.choose(**how).precision
    encoders = [load(name, precision) for name in names]
    if args.slides:
        mpps = mpps or list(extraction.MPPS)
        given = args.tile_px or 256, args.mpp_csv, args.tissue
        store, out = extraction.slide_store(args.slides, args.out, mpps, *given), None
    else:
        store, out = FieldStore(args.fields), args.out
    do = extraction.describe if args.dry_run else extraction.extract
    return do(store, encoders, out=out, mpps=mpps, **how)


def _regions(args: argparse.Namespace, encoders: list[str]) -> object:
    from pathme_jax.encoders import region_extraction

    if len(encoders) > 1:
        raise UserError("--regions takes one encoder", "Run once for each")
    if args.dry_run:
        return region_extraction.describe(args.regions, encoders[0])
    return region_extraction.extract_regions(
        args.regions,
        encoders[0],
        out=args.out,
        dtype=args.dtype,
        precision=args.precision,
        batch=args.batch or 8,
    )


if __name__ == "__main__":
    main()
