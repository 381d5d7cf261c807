"""Holds arrays against the shapes that the comments beside their fields say: `tokens: Array  # [N] int32, ...`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from typing import Any

import numpy as np

DTYPES = ("int32", "uint32", "float32", "bool")
FIELD = re.compile(r"^    (\w+): (?:Array|Any)\b[^#\n]*#\s*(?:\[([^\]]*)\])?\s*(\w+)?", re.MULTILINE)


@functools.cache
def said(kind: type) -> dict[str, tuple[list[str] | None, str | None]]:
    """Of each field of a class with such a comment: its sizes (none of a scalar), and its dtype if it is named."""
    found = {}
    for name, sizes, word in FIELD.findall(inspect.getsource(kind)):
        dtype = word if word in DTYPES else None
        line = next(line for line in inspect.getsource(kind).splitlines() if line.startswith(f"    {name}: "))
        if "# [" in line:
            found[name] = (re.split(r",\s*(?![^(]*\))", sizes), dtype)
        elif dtype:
            found[name] = ([], dtype)
    return found


def check(value: Any, sizes: dict[str, int]) -> int:
    """Assert it of every array in a tree of dataclasses; how many were looked at.

    sizes: what the letters stand for. One that is not there may be anything, but the same throughout an object.
    """
    if isinstance(value, (tuple, list)):
        return sum(check(item, sizes) for item in value)
    if not dataclasses.is_dataclass(value):
        return 0
    looked_at, mine = 0, dict(sizes)
    for name, (expected, dtype) in said(type(value)).items():
        array = getattr(value, name)
        if array is None:
            continue
        where = f"{type(value).__name__}.{name}"
        assert len(array.shape) == len(expected or []), f"{where}: {array.shape}, and the comment says {expected}"
        for size, text in zip(array.shape, expected or [], strict=True):
            assert size == _number(text, size, mine), f"{where}: {array.shape}, and the comment says {expected}, {mine}"
        assert dtype is None or np.dtype(array.dtype) == np.dtype(dtype), f"{where}: {array.dtype}, not {dtype}"
        looked_at += 1
    return looked_at + sum(check(getattr(value, field.name), sizes) for field in dataclasses.fields(value))


def _number(text: str, size: int, sizes: dict[str, int]) -> int:
    """What "D+1", "(1 + taps) H", "K²" or "V'" stands for."""
    text = re.sub(r"\)\s+(?=\w)", ") * ", text.strip().replace("²", "**2").replace("'", "_cropped"))
    if re.fullmatch(r"[A-Za-z_][\w ]*", text) and text not in sizes:
        sizes[text] = size
    return sizes[text] if text in sizes else int(eval(text, {"__builtins__": {}}, sizes))
