"""What stands in a JSON file, held against what should: a wrong type is one sentence with the file and the key."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from frspec_jax.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of a JSON object; `file` is what errors call it."""

    data: Mapping[str, Any]
    file: str

    def __post_init__(self) -> None:
        if not isinstance(self.data, Mapping):
            raise UserError(f"{self.file} holds {_shown(self.data)}, and must hold an object with named entries")

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number. `default` stands for an entry that is missing or null; None: it must be there."""
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise self.wrong(key, f"a whole number of at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def inner(self, *keys: str) -> Entries:
        """The object under the first of these keys that is there and not null; an empty one where there is none."""
        key = next((key for key in keys if self.data.get(key) is not None), keys[0])
        value = self.data.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(key, "an object with named entries")
        return Entries(value or {}, f"{self.file}, {key}")

    def wrong(self, key: str, wanted: str) -> UserError:
        """The error of an entry that is not what it must be."""
        return UserError(f"{self.file}: {key} is {_shown(self.data.get(key))}, and must be {wanted}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        if value is not None:
            return value
        if default is None:
            raise UserError(f"{self.file}: the entry {key!r} is missing")
        return default


def checked(kind: type[T], data: Any, file: str) -> T:
    """A frozen dataclass out of the entries that are called like its fields; others are left alone.

    Raises:
      UserError: an entry is missing, or of another type than its field; `file` is what the sentence calls the place.
    """
    entries = Entries(data, file)
    hints = typing.get_type_hints(kind)
    given = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in entries.data:
            given[field.name] = _as(hints[field.name], entries, field.name, entries.data[field.name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{file}: the entry {field.name!r} is missing")
    return kind(**given)


def _as(hint: Any, entries: Entries, key: str, value: Any) -> Any:
    """`value` as an annotation says."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        (hint,) = (part for part in parts if part is not type(None))
        return _as(hint, entries, key, value)
    if origin is Literal:
        if value in parts and type(value) in {type(part) for part in parts}:
            return value
        raise entries.wrong(key, f"one of {', '.join(map(str, parts))}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise entries.wrong(key, "a list")
        return tuple(_as(parts[0], entries, key, one) for one in value)
    if dataclasses.is_dataclass(hint):
        place, names = f"{entries.file}, {key}", {field.name for field in dataclasses.fields(hint)}
        unknown = set(Entries(value, place).data) - names
        if unknown:  # an inner object is ours alone: an entry that nobody reads is one that is misspelt
            raise UserError(
                f"{place}: the entry {min(map(str, unknown))!r} is not known; {', '.join(sorted(names))} are"
            )
        return checked(typing.cast(type, hint), value, place)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31:
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    wanted = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}.get(hint, "of another kind")
    raise entries.wrong(key, wanted)


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
