"""Files and folders that a command writes at its end: what cannot be written is refused before the work begins."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from frspec_jax.errors import UserError


def file_of(flag: str) -> Callable[[str], Path]:
    """What argparse makes of a flag's value (`type`), where that is a file to write. Nothing is made yet.

    Raises:
      UserError: when called, of a file that cannot be written.
    """

    def checked(text: str) -> Path:
        path = Path(text)
        if path.is_dir():
            raise UserError(f"{flag} {path} is a folder; name a file")
        _try(path.parent, f"{flag} {path}", "name another file")
        return path

    return checked


def folder_of(flag: str) -> Callable[[str], Path]:
    """The same for a folder; it and those above it need not be there yet."""

    def checked(text: str) -> Path:
        if not text.strip():
            raise UserError(f"{flag} is empty; name a folder")
        check_folder(Path(text), flag)
        return Path(text)

    return checked


def check_folder(folder: Path, flag: str = "--out") -> None:
    """Refuse a folder that cannot be written."""
    _try(folder, f"{flag} {folder}", "name another folder")


def _try(folder: Path, wanted: str, mend: str) -> None:
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=nearest):  # tried, for leave to write is not all that it takes
            pass
    except OSError as error:
        raise UserError(f"{wanted} cannot be written: {error.strerror}; {mend}") from None
