"""JSON Lines: one value a line."""

from __future__ import annotations

from collections.abc import Iterator


def numbered(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1.

    Only a newline ends a line: U+2028, U+0085 and others, at which `str.splitlines` would split too, may stand in a
    JSON string as they are.
    """
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
