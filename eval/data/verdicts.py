r"""What an answer says, as a person would read it: the code that it gives, and the number that it states.

A model that thinks aloud gives its answer behind the thought. Around code it says things, shows how to call it, and
corrects itself; behind a number it adds remarks, or goes on with a question of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

THOUGHT_ENDS = "</think>"
FENCE = re.compile(r"^(?P<before>.*?)(?P<fence>`{3,}|~{3,})(?P<about>[^`]*)$")
LIST_ITEM = re.compile(r"\s*(?:(?:[-*+]|\d+[.)])\s+)?")
STARTS_CODE = re.compile(r"(?:import|async\s+def|def|class)\s+\w|from\s+\S+\s+import\b|@\w")

# A number, without the digit of a unit or an exponent (cm2, m^2, m^{2}); a dash behind a digit is no sign of it.
NUMBER = re.compile(r"(?<![\w^])(?<!\^\{)(?:(?<![\w)\]])-\s?)?[$€£]?(\d{1,3}(?:,\d{3})+(?!\d)|\d+)(\.\d+)?")
STATED = re.compile(r"the(?:\s+final)?\s+answer\s+is\b|####|\\boxed\s*\{", re.IGNORECASE)
# What stands for the same sign or none: a minus of Unicode, and what parts thousands in LaTeX and in print.
SPELLINGS = (("\u2212", "-"), ("{,}", ","), ("\\,", ""), ("\\!", ""))


def said(text: str) -> str:
    """What is said once the thought has ended."""
    return text.rpartition(THOUGHT_ENDS)[2]


# Code --------------------------------------------------------------------------------------------


def code_of(text: str, entry: str, stub: str = "") -> str:
    """The code of an answer that is to define a function.

    The last block between fences that defines it, one that compiles before one that does not; else the last that goes
    on with the function's head; else the last that compiles. Without fences, the lines from the first import or def on,
    as far as they compile; or the whole, as far as it goes on with the head.

    Args:
      entry: the function's name. stub: its head, with what stands before it.
    """
    text = said(text.replace("\r\n", "\n"))
    blocks = list(fenced(text))
    if not blocks:
        return _unfenced(text, entry, stub)
    for wanted in (
        lambda code: defines(code, entry) and compiles(code),
        lambda code: defines(code, entry),
        lambda code: code.lstrip("\n")[:1].isspace() and compiles(stub + code),
        compiles,
    ):
        if found := [code for code in blocks if wanted(code)]:
            return found[-1]
    return blocks[-1]


def fenced(text: str) -> Iterator[str]:
    """What stands between fences, closed or not, each block moved to the margin of its fence."""
    lines = iter(text.split("\n"))
    for line in lines:
        opening = FENCE.match(line)
        if opening is None:
            continue
        fence, before = opening["fence"], opening["before"]
        item = LIST_ITEM.fullmatch(before)
        margin = len(before) if item else 0
        block: list[str] = []
        for line in lines:
            end = line.rstrip()
            if end.endswith(fence) and not end.strip(fence[0]).strip():
                break
            if end.endswith(fence) and fence[0] == "`":  # behind the last line of code
                block.append(end.rstrip("`"))
                break
            block.append(line[min(margin, len(line) - len(line.lstrip())) :])
        yield "".join(f"{one}\n" for one in block)


def defines(code: str, entry: str) -> bool:
    """Whether code gives a function a name, by def or by assignment."""
    name = re.escape(entry)
    return re.search(rf"^\s*(?:async\s+)?def\s+{name}\b|^{name}\s*(?::[^=\n]+)?=[^=]", code, re.MULTILINE) is not None


def compiles(code: str) -> bool:
    """Whether it is Python, and some of it."""
    try:
        compile(code, "<answer>", "exec")
    except (SyntaxError, ValueError):  # ValueError: of null characters
        return False
    return bool(code.strip())


def _unfenced(text: str, entry: str, stub: str) -> str:
    lines = text.split("\n")
    first = next((n for n, line in enumerate(lines) if STARTS_CODE.match(line)), None)
    if first is not None:
        for behind in range(len(lines), first, -1):
            code = "\n".join(lines[first:behind]) + "\n"
            if compiles(code) and defines(code, entry):
                return code
    for behind in range(len(lines), 0, -1):
        code = "\n".join(lines[:behind]) + "\n"
        if code.strip() and compiles(stub + code):
            return code
    return text


# Numbers -----------------------------------------------------------------------------------------


def number_of(text: str) -> str | None:
    r"""The number that an answer states, without what parts its thousands; None: there is none.

    That behind the first "The answer is" or "####", or in the first \boxed{}; the last of all where none of these
    stands.
    """
    text = said(text)
    for spelling, meant in SPELLINGS:
        text = text.replace(spelling, meant)
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", "", text)
    for marker in STATED.finditer(text):
        rest = text[marker.end() :]
        statement = _braced(rest) if marker[0].endswith("{") else rest.split("\n", 1)[0]
        # "20 - 5 = 15": what comes out of it.
        result = re.search(rf"=\s*({NUMBER.pattern})[^\d=]*$", statement.split(". ", 1)[0])
        found = result[1] if result else _first(statement) or _first(_across_lines(rest))
        if found is not None:
            return _plain(found)
    every = [match[0] for match in NUMBER.finditer(text)]
    return _plain(every[-1]) if every else None


def _plain(number: str) -> str:
    return re.sub(r"[,\s$€£]", "", number)


def _first(text: str) -> str | None:
    found = NUMBER.search(text)
    return found[0] if found else None


def _across_lines(rest: str) -> str:
    """What stands behind a marker, if it comes on a later line and nothing is said before it."""
    said_before = re.match(r"[^\n]*\w", rest)
    return "" if said_before else rest.lstrip().split("\n", 1)[0]


def _braced(rest: str) -> str:
    """Up to the brace that closes the one before."""
    depth = 1
    for at, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[:at]
    return rest.split("\n", 1)[0]
