"""What `python -m train|convert|eval` share: sub-commands, one file each, imported when called for, and a console."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from rich.console import Console

from frspec_jax.entry import spelled
from frspec_jax.errors import reported


class Parser(argparse.ArgumentParser):
    """An argparse parser that says commands as this user types them (`frspec_jax.entry`)."""

    def __init__(self, prog: str | None = None, **settings: Any) -> None:
        super().__init__(prog and spelled(prog), **settings)

    def format_help(self) -> str:
        return spelled(super().format_help())

    def error(self, message: str) -> NoReturn:
        super().error(spelled(message))


def dispatch(
    package: str,
    description: str,
    commands: Mapping[str, str],
    argv: Sequence[str] | None = None,
    *,
    home: str | None = None,
    after: Callable[[argparse.Namespace], Sequence[str]] | None = None,
) -> None:
    """Parse the command line and run `home.COMMAND`, a module with `add_arguments(parser)` and `run(args)`.

    A hyphen of a command is an underscore of its module.

    commands: name and one line of help. Only the command at hand is imported, so that the others' help need not
    wait for JAX. home: the package of the modules, if it is not `package`. after: given what was asked for and is
    done, the commands that a user may want next; they go to standard error.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog=f"python -m {package}", description=description)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = None
    for name, text in commands.items():
        sub = choices.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if argv[:1] == [name]:
            module = importlib.import_module(f"{home or package}.{name.replace('-', '_')}")
            sub.description = module.__doc__
            module.add_arguments(sub)
    with reported():
        args = parser.parse_args(argv)
        assert module is not None, "argparse has refused every other command"
        module.run(args)
        for line in after(args) if after is not None else ():
            print(spelled(f"next: {line}"), file=sys.stderr)


def results_console() -> Console:
    """Where tables go: as wide as the terminal, and in a file or a pipe wide enough that no cell is cut.

    Brackets are brackets: a draft may be called [mine].
    """
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, markup=False)
