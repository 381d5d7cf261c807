"""`python -m train COMMAND ...`: one sub-command a file."""

from __future__ import annotations

import argparse
import importlib
import sys

from frspec_jax.errors import reported

COMMANDS = {
    "rank": "count tokens: which ones may the draft propose?",
    "answers": "let the target answer prompts, as training data",
    "eagle": "train an EAGLE-2 draft",
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m train", description="From a target to its draft.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        sub = commands.add_parser(name, help=help_text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if argv[:1] == [name]:  # only the command at hand is imported: the others' --help need not wait for JAX
            module = importlib.import_module(f"train.{name}")
            sub.description = module.__doc__
            module.add_arguments(sub)
    args = parser.parse_args(argv)
    with reported():
        importlib.import_module(f"train.{args.command}").run(args)


if __name__ == "__main__":
    main()
