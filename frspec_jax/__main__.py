"""`frspec COMMAND ...`, or `python -m frspec_jax COMMAND ...`: every command of the project behind one name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from frspec_jax import __version__, entry
from frspec_jax.commands import Parser
from frspec_jax.errors import UserError, reported

# The module with the command's `main(argv)`; those without a dot are folders of the repository's root.
COMMANDS = {
    "generate": ("frspec_jax.generate", "answer prompts, with or without a draft"),
    "convert": ("convert", "bring a model or a draft into our format, or a draft out of it"),
    "train": ("train", "rank tokens, let the target answer, train drafts"),
    "eval": ("eval", "measure: speed, accepted length, the paper's tables, the fastest setting"),
    "serve": ("frspec_jax.serve.__main__", "an OpenAI-compatible server and a chat page"),
    "doctor": ("frspec_jax.doctor", "what is installed and found here, and what to mend"),
}


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="frspec", description="FR-Spec in JAX: the target's own text, sooner.")
    parser.add_argument("--version", action="version", version=f"frspec-jax {__version__}")
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        choices.add_parser(name, help=text, add_help=False)
    if not argv:
        parser.print_help(sys.stderr)
        sys.exit(2)
    command = parser.parse_args(argv[:1]).command
    with reported():
        home = COMMANDS[command][0]
        module = importlib.import_module(home) if "." in home else folder_main(home)
        module.main(argv[1:])


def folder_main(name: str) -> ModuleType:
    """The module `NAME.__main__` of one of our folders, whatever else of that name lies in the current folder.

    Raises:
      UserError: the folder is not there, or the process has imported another module of that name.
    """
    home = entry.root()
    sys.path.insert(0, str(home))
    if not (home / name / "__main__.py").is_file():
        raise UserError(f"{home / name} is not there; install frspec-jax again, or work from its repository")
    module = importlib.import_module(f"{name}.__main__")
    if not Path(str(module.__file__)).resolve().is_relative_to(home):
        raise UserError(f"a module {name} of yours is imported already; run frspec {name} in a process of its own")
    return module


if __name__ == "__main__":
    main()
