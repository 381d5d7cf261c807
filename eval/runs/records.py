"""A run on disk: a manifest that says what is measured, and one JSON line a question.

RUN/manifest.json    the configuration, the machine and the versions; written once, before the first line
RUN/records.jsonl    appended to, each line on disk before the next question is begun

A line counts once its newline is there, so a run that is killed at any moment goes on behind its
last whole line, and counts no question twice.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from frspec_jax import files, locks
from frspec_jax.errors import UserError

FORMAT = "frspec-jax run 1"
Record = dict[str, Any]


class Records:
    """The records of a run that is being made: what is there already, and `append` for the next."""

    def __init__(self, file: Path, lines: list[Record], handle: Any) -> None:
        self.file, self.lines, self._handle = file, lines, handle

    def append(self, record: Record) -> None:
        """Add a record; it is on disk when this returns."""
        try:
            line = memoryview(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            while line:  # a disk that is nearly full takes a part
                line = line[self._handle.write(line) :]
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise files.not_written(f"--out {self.file}", error, "the same command goes on") from None
        self.lines.append(record)


@contextlib.contextmanager
def opened(folder: Path, configuration: Mapping[str, Any]) -> Iterator[Records]:
    """Begin a run in `folder`, or go on with the one there; held for this process alone.

    Raises:
      UserError: the run there has another configuration, another process is at it, or the folder
        cannot be written or is damaged.
    """
    file = folder / "records.jsonl"
    with locks.folder_lock(folder, f"--out {folder}"):
        manifest = {"format": FORMAT, **json.loads(json.dumps(configuration))}
        if (folder / "manifest.json").is_file():
            _refuse_other(folder, read_manifest(folder), manifest)
        elif file.exists() and file.stat().st_size:
            raise UserError(f"--out {folder} holds records and no manifest.json; name another folder")
        else:  # before the records: a disk without room for it is left as it was
            files.write_json(folder / "manifest.json", manifest, f"--out {folder / 'manifest.json'}")
        with _for_appending(file) as handle:
            handle.seek(0)
            lines, whole = _parse(file, handle.read())
            handle.truncate(whole)
            yield Records(file, lines, handle)


@contextlib.contextmanager
def _for_appending(file: Path) -> Iterator[Any]:
    """A file to add lines to. What could not be written is not tried again as it is closed: the error was told."""
    try:
        handle = open(file, "a+b", buffering=0)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise files.not_written(f"--out {file}", error, "name another folder") from None
    try:
        yield handle
    finally:
        handle.close()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a run measures: the configuration that it was begun with.

    Raises:
      UserError: the folder holds no run, or the file is damaged.
    """
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except OSError:
        raise UserError(f"{folder} holds no manifest.json, so it is no run of python -m eval run") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); make the run again in another folder") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file} does not say format {FORMAT!r}; make the run again in another folder")
    return manifest


def read_records(folder: Path) -> list[Record]:
    """The records of a run, finished or not; a torn last line is left out."""
    file = folder / "records.jsonl"
    try:
        return _parse(file, file.read_bytes())[0]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def _parse(file: Path, data: bytes) -> tuple[list[Record], int]:
    """The records, and how many bytes they take: what follows the last newline was never finished."""
    whole = data.rfind(b"\n") + 1
    lines: dict[tuple[str, int], Record] = {}
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
            key = (record["question"], record["repeat"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number} is damaged ({error}); delete that line, and run again") from None
        if key in lines:
            raise UserError(f"{file}, line {number} counts {key[0]} twice; delete that line")
        lines[key] = record
    return list(lines.values()), whole


def _refuse_other(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    old, new = _flat(there), _flat(here)
    for name in [*old, *new]:
        if old.get(name) != new.get(name):
            raise UserError(
                f"--out {folder} was begun with {name} {old.get(name)}, and this command has {new.get(name)}; "
                "give the same flags to go on with it, or name another folder"
            )


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Nested dictionaries as one: {"tree": {"size": 8}} becomes {"tree size": 8}."""
    if not isinstance(tree, Mapping):
        return {name: tree}
    return {key: value for k, v in tree.items() for key, value in _flat(v, f"{name} {k}".strip()).items()}
