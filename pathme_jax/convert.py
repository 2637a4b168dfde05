"""Released weights of a public encoder into a folder that `pathme_jax.encoders.load` reads.

    python -m pathme_jax.convert --encoder uni --weights pytorch_model.bin --out encoders/uni
    python -m pathme_jax.convert --encoder phikon-v2 --weights phikon-v2/ --out encoders/phikon-v2

Takes .safetensors, .bin, .pth and Hugging Face folders. Every key must be used and every parameter
filled. Pickles are read as tensors alone (`weights_only`), which needs PyTorch.
`python -m pathme_jax.encoders list` names the encoders and where their weights are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pathme_jax.errors import launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pathme_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--encoder", required=True, metavar="NAME", help="such as uni or virchow2")
    parser.add_argument(
        "--weights", required=True, type=Path, metavar="FILE|DIR", help="a file, or its folder"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the folder to write"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the weights, write nothing")
    args = parser.parse_args(argv)

    from pathme_jax.encoders import conversion

    done = conversion.convert(args.encoder, args.weights, args.out, dry_run=args.dry_run)
    print(done.words())


if __name__ == "__main__":
    main()
