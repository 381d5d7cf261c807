"""Files that a later run reads, and folders that appear whole: written aside and renamed.

A reader finds a file whole, as it was, or not at all, whatever interrupts the writer. What a killed writer leaves,
`.NAME.part-PID`, is told from the part of a living one by the kernel's lock on it, which ends with the process: a
process id would not do, since another process, or one in another container, may bear the same.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frspec_jax.errors import UserError

if sys.platform != "win32":
    import fcntl

SETTLE = 0.3  # seconds in which writes beside one that the system refused come to their end
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# Errors ------------------------------------------------------------------------------------------


def not_written(what: object, error: OSError, mend: str = "name another place") -> UserError:
    """The sentence for a file or folder that the system would not let us write.

    what: its name, with the flag that gave it, if any. mend: what helps where it is not room that is missing.
    """
    mend = "make room and run the command again" if error.errno in FULL else mend
    return UserError(f"{what} cannot be written: {error.strerror or error}; {mend}")


@contextlib.contextmanager
def writing(what: object, mend: str = "name another place") -> Iterator[None]:
    """Turn the system's refusal to write (disk full, read-only) into the sentence of `not_written`.

    Interrupted system calls and a reader that went away (`| head`) are no such refusals.
    """
    try:
        with orbax_refusals():
            yield
    except (BrokenPipeError, InterruptedError):
        raise
    except OSError as error:
        raise not_written(what, error, mend) from None


@contextlib.contextmanager
def orbax_refusals() -> Iterator[None]:
    """Turn what Orbax makes of the system's refusal to write, a ValueError, back into the OSError that it was.

    Its log of it, hundreds of lines from several threads, is left out: all of it comes as the exception.
    """
    log, unraisable = logging.getLogger("absl"), sys.unraisablehook
    outermost = _not_of_orbax not in log.filters
    log.addFilter(_not_of_orbax)
    try:
        yield
    except ValueError as error:
        if (found := re.search(r"os_error_code='(\d+)'", str(error))) is None:
            raise
        # The arrays beside the one that was refused are still being written, and nobody waits for them.
        sys.unraisablehook = lambda one: None if "Event loop is closed" in str(one.exc_value) else unraisable(one)
        time.sleep(SETTLE)
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from None
    finally:
        if outermost:
            log.removeFilter(_not_of_orbax)
        sys.unraisablehook = unraisable


@functools.cache
def leave_orbax_out() -> None:
    """From now on nothing is printed of how Orbax's own tasks end: when an error is ours to tell, some still run."""
    others = sys.unraisablehook

    def hook(one: sys.UnraisableHookArgs) -> None:
        code = getattr(one.object, "cr_code", None)  # of a coroutine
        if "orbax" not in getattr(code, "co_filename", ""):
            others(one)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


# Parts -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def part_of(out: Path, *, folder: bool = False, suffix: str = "") -> Iterator[Path]:
    """An empty file, or folder, beside `out`, for this process alone; what stands there at the end is removed.

    The block fills it and renames it to `out`, with `put_in_place`. Parts of dead processes are cleared first, and
    one that cannot be cleared is passed by under another name.

    Args:
      folder: a folder is wanted, not a file. suffix: what the part's name must end with (".npz" for numpy).

    Raises:
      OSError: the folder of `out` is missing, full or read-only.
    """
    clear_parts(out)
    for number in range(1 << 20):
        part = out.with_name(f".{out.name}.part-{os.getpid()}{f'-{number}' if number else ''}{suffix}")
        try:
            part.mkdir() if folder else os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            held = _hold_part(part)
        except (FileExistsError, BlockingIOError):
            continue
        # Between the making and the lock, a writer that clears may have taken it for a dead one's.
        if held is None or is_still(part, held):
            break
        os.close(held)
    try:
        yield part
    finally:
        _remove(part)
        if held is not None:
            os.close(held)


def clear_parts(out: Path) -> None:
    """Remove what killed writers of `out` have left beside it; parts of living ones stay, whoever they are.

    Where the system keeps no locks on files, nothing is known of the writers, and everything stays.
    """
    prefix = f".{out.name}.part-"
    try:
        parts = [path for path in out.parent.iterdir() if path.name.startswith(prefix)]
    except OSError:  # no such folder, or one that we may not look into: whoever writes there will hear of it
        return
    for part in parts:
        with contextlib.suppress(BlockingIOError):
            if (held := _hold_part(part)) is not None:
                _remove(part)
                os.close(held)


def put_in_place(part: Path, out: Path) -> None:
    """Rename a whole part to `out`, in place of what stood there, once it is on disk; a folder replaces nothing.

    Raises:
      OSError: the system refuses; a disk's refusal may come as late as here.
    """
    if not part.is_dir():
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
    part.replace(out)
    _sync_folder(out.parent)


def _hold_part(part: Path) -> int | None:
    """A descriptor that holds the lock of a part; None where the system has no such locks.

    Raises:
      BlockingIOError: another writer holds it, or has cleared it.
    """
    if sys.platform == "win32":  # which locks no folder, and removes and renames no file that is open
        return None
    try:
        held = os.open(part, os.O_RDONLY)
    except FileNotFoundError:
        raise BlockingIOError from None
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise
    except OSError:
        os.close(held)
        return None
    return held


def is_still(path: Path, held: int) -> bool:
    """Whether a path leads to what a descriptor has open: it may have been removed, and made anew, meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(held))
    except FileNotFoundError:
        return False


def _remove(part: Path) -> None:
    if part.is_dir():
        for _ in range(20):  # a thread of Orbax may still be writing a file into it
            shutil.rmtree(part, ignore_errors=True)
            if not part.exists():
                return
            time.sleep(SETTLE / 20)
    else:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring a renaming to the disk, where the system can."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


# Files -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_aside(out: Path, what: object = None, *, suffix: str = "") -> Iterator[Path]:
    """The path of a file to fill, which takes the name `out`, in place of an older one, once the block has ended well.

    Args:
      what: how to call it in a refusal: by its flag (default: the path). suffix: of the path to fill, if any.

    Raises:
      UserError: it cannot be written; nothing is left of it, and an older file stands as it was.
    """
    out = Path(out)
    with writing(what or out, "name another file"), part_of(out, suffix=suffix) as part:
        yield part
        put_in_place(part, out)


def write_bytes(out: Path, data: bytes, what: object = None) -> None:
    """Write a file whole or not at all; see `written_aside`."""
    with written_aside(out, what) as part:
        part.write_bytes(data)


def write_text(out: Path, text: str, what: object = None) -> None:
    """Write a text in UTF-8, whole or not at all; see `written_aside`."""
    write_bytes(out, text.encode(), what)


def write_json(out: Path, data: Any, what: object = None) -> None:
    """Write JSON, indented, whole or not at all; see `written_aside`."""
    write_text(out, json.dumps(data, indent=2) + "\n", what)


# Folders -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(out: Path, flag: str = "--out") -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name once the block has ended well.

    An interruption leaves nothing under the name `out`. An existing `out` is refused.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{flag} {out} exists already; remove it or name another folder")
    what = f"{flag} {out}"
    with writing(what, "name another folder"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with part_of(out, folder=True) as part:
            yield part
            put_in_place(part, out)


def check_writable(folder: Path, what: object = None) -> None:
    """See, before work starts, that files can be written under a folder, which need not exist yet.

    Raises:
      UserError: they cannot; nothing is left either way.
    """
    folder = Path(folder).absolute()
    with writing(what or folder, "name another folder"):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with part_of(there / "writable"):
            pass
