"""Predicts new slides with a bundle: tiles, encodes, predicts, draws where the heads looked. Research use only.

    python -m pathme_jax.predict slide.svs other.ndpi --bundle bundles/mine --out predictions

A line for each slide; <out>/<slide>/ holds prediction.json, attention.h5 and heatmap.jpg. Where the bundle's heads
were right too seldom at such a confidence, it abstains. What is there under the same bundle is skipped; a slide
that fails is listed at the end and stops no other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pathme_jax.errors import launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pathme_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("slides", nargs="+", type=Path, metavar="SLIDE", help="whole-slide files")
    add("--bundle", type=Path, required=True, metavar="DIR", help="what pathme_jax.bundle wrote")
    add(
        "--out", type=Path, default=Path("predictions"), metavar="DIR", help="(default predictions)"
    )
    add(
        "--mpp", type=float, metavar="X", help="µm per level-0 pixel of slides that do not state it"
    )
    add(
        "--threshold",
        type=float,
        metavar="T",
        help="confidence below which it abstains (default: the bundle's, learned out of fold)",
    )
    add("--precision", help="of computation: float32 (default on a CPU) or bfloat16 (else)")
    add("--batch", type=int, help="tiles at once (default 32 on a CPU, else 256 a device)")
    add("--workers", type=int, help="processes that read (default: a core each; on a CPU threads)")
    args = parser.parse_args(argv)

    from pathme_jax.mil.prediction import predict

    how = {name: getattr(args, name) for name in ("precision", "batch", "workers")}
    print(
        predict(args.slides, args.bundle, args.out, mpp=args.mpp, threshold=args.threshold, **how)
    )


if __name__ == "__main__":
    main()
