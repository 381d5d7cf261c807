"""Every command as its own parser says it: the page `commands.md` of the site, and what tests of the docs parse with.

Nothing of it is written down twice: a flag that changes changes here.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

from frspec_jax.entry import COMMAND

FOLDERS = {"convert": "convert", "train": "train", "eval": "eval.commands"}
ALONE = {"generate": "frspec_jax.generate", "serve": "frspec_jax.serve.__main__", "doctor": "frspec_jax.doctor"}
HEAD = """# Every command

This page is made from the commands' own parsers. In the repository `frspec train ...` may also be typed
`python -m train ...`, and likewise `convert` and `eval`; `frspec generate` is `python -m frspec_jax.generate`, and
likewise `serve` and `doctor`. A mistake ends a command with exit status 2 and one sentence that names the flag or file
and what would mend it.
"""


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command, as "generate" or "train rank", with its parser."""
    for name, module in ALONE.items():
        yield name, importlib.import_module(module).arguments()
    for folder, home in FOLDERS.items():
        for command in importlib.import_module(f"{folder}.__main__").COMMANDS:
            module = importlib.import_module(f"{home}.{command.replace('-', '_')}")
            parser = argparse.ArgumentParser(prog=f"frspec {folder} {command}", description=module.__doc__)
            module.add_arguments(parser)
            yield f"{folder} {command}", parser


def summaries() -> dict[str, str]:
    """One line of help for each command of a folder."""
    found = {}
    for folder in FOLDERS:
        commands = importlib.import_module(f"{folder}.__main__").COMMANDS
        found |= {f"{folder} {name}": text for name, text in commands.items()}
    return found


def page() -> str:
    """The page, in Markdown."""
    helped = summaries()
    parts = [HEAD]
    for name, parser in parsers():
        parser.prog = f"frspec {name}"
        about = _ours(parser.description or "")
        title = f"## frspec {name}\n"
        lead = f"*{helped[name]}*\n" if name in helped else ""
        parts.append("\n".join([title, lead, paragraphs(about), *tables(parser)]))
    return "\n\n".join(parts) + "\n"


def paragraphs(text: str) -> str:
    """A docstring as Markdown: indented lines, which show a file's form, stay as they are."""
    blocks = text.strip().split("\n\n")
    return "\n\n".join(f"```text\n{block}\n```" if block.startswith("    ") else block for block in blocks) + "\n"


def tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table of flags for each group that has any."""
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        actions = [action for action in actions if not isinstance(action, argparse._HelpAction)]
        if not actions:
            continue
        known = ("options", "optional arguments", "positional arguments")
        title = "" if group.title in known or not group.title else f"**{group.title}**"
        if title and group.description:
            title += f": {_ours(group.description)}"
        yield "\n".join(["", title, "", "| flag | |", "|---|---|", *(row(parser, formatter, one) for one in actions)])


def row(parser: argparse.ArgumentParser, formatter: argparse.HelpFormatter, action: argparse.Action) -> str:
    """A flag and what it says."""
    said = formatter._expand_help(action) if action.help else ""
    if action.option_strings:
        values = "" if action.nargs == 0 else " " + formatter._format_args(action, _metavar(action))
        name = ", ".join(action.option_strings) + values
    else:
        name = formatter._format_args(action, _metavar(action))
    needed = "; **required**" if action.required and action.option_strings else ""
    return f"| `{_cell(name)}` | {_cell(_plain(_ours(said)))}{needed} |"


def _ours(text: str) -> str:
    """The text with its commands behind one name."""
    return COMMAND.sub(r"frspec \1", text)


def _metavar(action: argparse.Action) -> str:
    if action.choices is not None and action.metavar is None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _plain(text: str) -> str:
    """Text in which Markdown and HTML find nothing to read: `*` for all origins is no emphasis."""
    return text.replace("*", r"\*").replace("_", r"\_").replace("<", "&lt;")
