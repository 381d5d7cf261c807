"""`python -m convert FORMAT ...`: one sub-command a format, each in a file of its own."""

from __future__ import annotations

import argparse

from convert import gguf
from frspec_jax.errors import reported

COMMANDS = {"gguf": gguf}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m convert", description="Bring a model or a draft into our format.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="FORMAT")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.__doc__.split("\n\n", 1)[-1])
        module.add_arguments(sub)
    args = parser.parse_args()
    with reported():
        COMMANDS[args.command].run(args)


if __name__ == "__main__":
    main()
