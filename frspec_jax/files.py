"""Files that outlive a command: written whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frspec_jax.errors import UserError

LOCK = ".lock"  # in a folder that one process at a time may write to


def reason(error: OSError) -> str:
    """Why a write failed, in words."""
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)


# Writing aside -----------------------------------------------------------------------------------


@contextlib.contextmanager
def aside(path: Path, mend: str = "make room, or name another place") -> Iterator[Path]:
    """A file beside `path` that takes its name once the block has ended well; until then an old `path` stays.

    Raises:
      UserError: the system refuses to write; nothing is left of what was written.
    """
    part = _part_of(path)
    try:
        clear_left_overs(path)
        yield part
        with open(part, "rb") as written:
            os.fsync(written.fileno())  # or a crash could leave the name of a file that is empty
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}; {mend}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str, mend: str = "make room, or name another place") -> None:
    """Put `text` into a file, whole or not at all."""
    with aside(path, mend) as part:
        part.write_text(text, "utf-8")


def write_json(path: Path, data: Any, mend: str = "make room, or name another place") -> None:
    """Put `data` into a file as JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n", mend)


@contextlib.contextmanager
def new_folder(out: Path, flag: str = "--out") -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name once the block has ended well.

    An interruption leaves nothing under the name `out`. An existing `out` is refused.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{flag} {out} exists already; remove it or name another folder")
    part = _part_of(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        clear_left_overs(out)
        part.mkdir()
    except OSError as error:
        raise UserError(f"{flag} {out} cannot be written: {reason(error)}; name another folder") from None
    try:
        yield part
        part.rename(out)
    except OSError as error:
        raise UserError(f"{flag} {out} could not be written whole: {reason(error)}; nothing was left") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _part_of(path: Path) -> Path:
    """Where `path` is written before it has its name: hidden, and told apart by process.

    The number of a process may come again, in another container above all, so a part that bears ours may be
    somebody's left-over: `clear_left_overs` has removed it by then, unless its writer is alive.
    """
    return path.with_name(f".{path.name}.part-{os.getpid()}")


def clear_left_overs(path: Path) -> None:
    """Remove what processes that are gone have left of writing `path`; our own number stood for somebody else then."""
    pattern = re.compile(re.escape(f".{path.name}.part-") + r"(\d+)(\.\w+)?")
    if not path.parent.is_dir():
        return
    for other in path.parent.iterdir():
        if (found := pattern.fullmatch(other.name)) and not _lives(int(found[1])):
            if other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
            else:
                other.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


# One writer --------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_writer(folder: Path, flag: str) -> Iterator[None]:
    """Holds a folder while the block runs, so that no second process adds to it.

    The system lets go of a lock when its process ends, however that comes about, so a dead process holds nothing.

    Raises:
      UserError: another process holds it; or the folder cannot be written to.
    """
    file = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written to: {reason(error)}; name another folder") from None
    try:
        if not _locked(handle):
            holder = os.read(handle, 20).decode("ascii", "replace").strip() or "unknown"
            raise UserError(
                f"{flag} {folder} is being written by process {holder}; wait until it has ended, or name another folder"
            )
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    """Lock an open file; whether that went well. Where the system has no such locks (Windows), there is none."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks refuses otherwise; there it is as if nobody held the folder.
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
