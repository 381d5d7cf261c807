"""What stands as a comment beside a field of a dataclass is its documentation on the page of the API.

The house writes it there, where a reader of the code looks: `seed: int = 0  # of 64 bits`, or in the lines above.
"""

from __future__ import annotations

import ast
import io
import tokenize
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Gives each public field of a class without a docstring the comment that stands beside or above it."""

    def on_class_members(self, *, node: Any, cls: griffe.Class, **kwargs: Any) -> None:
        if not isinstance(node, ast.ClassDef):
            return
        lines = cls.lines_collection[cls.filepath]
        for name, member in cls.members.items():
            if name.startswith("_") or not member.is_attribute or member.docstring or not member.lineno:
                continue
            if said := comment_of(lines, member.lineno, member.endlineno or member.lineno):
                member.docstring = griffe.Docstring(said, parent=member)


def comment_of(lines: list[str], first: int, last: int) -> str:
    """The comment at the end of the lines first to last (counted from 1), or else the whole lines of it above."""
    beside = _comment(lines[last - 1])
    above: list[str] = []
    row = first - 2
    while row >= 0 and lines[row].strip().startswith("#"):
        above.insert(0, lines[row].strip().lstrip("# "))
        row -= 1
    said = beside or " ".join(above)
    return said[:1].upper() + said[1:] + ("" if said.endswith(".") else ".") if said else ""


def _comment(line: str) -> str:
    """What follows the `#` that begins a comment, and not one inside a string."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline):
            if token.type == tokenize.COMMENT:
                return token.string.lstrip("# ")
    except (tokenize.TokenError, SyntaxError):
        pass
    return ""
