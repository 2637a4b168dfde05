"""What public encoders this project knows.

python -m pathme_jax.encoders list [--json]
python -m pathme_jax.encoders show NAME
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from pathme_jax.errors import launcher


@launcher
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pathme_jax.encoders",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="a line each")
    listing.add_argument("--json", action="store_true", help="whole definitions, for programs")
    one = commands.add_parser("show", help="all that is known of one, and how to get it")
    one.add_argument("name")
    args = parser.parse_args(argv)

    from pathme_jax.encoders import zoo

    if args.command == "show":
        print(zoo.describe(zoo.find(args.name)))
    elif args.json:
        print(json.dumps([dataclasses.asdict(row) for row in zoo.ROWS], indent=1))
    else:
        print(zoo.table())


if __name__ == "__main__":
    main()
