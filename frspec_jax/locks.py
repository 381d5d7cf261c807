"""One writer at a time: a folder, or a file or folder that is to be, is held by one process until it lets go or dies.

The kernel keeps the lock (`flock`), so that a dead holder's is nobody's, whatever killed it. In the lock's file stand
the holder's process id, its host and since when, for whoever comes second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from frspec_jax.errors import UserError
from frspec_jax.files import is_still, writing

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"  # of a folder that `folder_lock` holds
READ = 512  # bytes of a lock's file that say who holds it
PAUSE = 0.2  # seconds between two tries of who waits


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock; empty where its file does not say."""

    process: int | None = None
    host: str = ""
    since: str = ""  # by the clock of that host, with its zone

    @classmethod
    def this(cls) -> Holder:
        """This process, from now on."""
        now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), now)

    @classmethod
    def read(cls, text: bytes) -> Holder:
        """Out of a lock's file, as `written` has it; an older one holds a process id alone."""
        process, host, since = [*text.decode("utf-8", "replace").strip().split(" ", 2), "", "", ""][:3]
        return cls(int(process), host, since) if process.isdigit() else cls()

    def written(self) -> bytes:
        """The text of a lock's file."""
        return f"{self.process} {self.host} {self.since}\n".encode()

    def __str__(self) -> str:
        if self.process is None:
            return "another process"
        here = "" if self.host in ("", socket.gethostname()) else f" on {self.host}"
        return f"process {self.process}{here}" + (f" since {self.since}" if self.since else "")

    @property
    def is_alive(self) -> bool:
        """Whether it may still run; of another host nobody knows."""
        if self.process is None or self.process == os.getpid():
            return False
        if self.host not in ("", socket.gethostname()):
            return True
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's
        return True


@contextlib.contextmanager
def folder_lock(folder: Path, what: object = None, *, patience: float = 0.0) -> Iterator[None]:
    """Let this process alone add to a folder, which is made if need be; a dead process's lock does not hold.

    If nothing was written, the folders that were made for it are removed at the end.

    Args:
      what: how to call the folder in a refusal: by its flag (default: the path).
      patience: seconds to wait for another holder.

    Raises:
      UserError: another process holds it, which is named; or the folder cannot be written.
    """
    folder = Path(folder)
    with _held(folder / LOCK, what or folder, patience):
        yield


@contextlib.contextmanager
def name_lock(out: Path, what: object = None) -> Iterator[None]:
    """Let this process alone make a file or folder, which need not be there yet; see `folder_lock`."""
    out = Path(out)
    with _held(out.with_name(f".{out.name}{LOCK}"), what or out, 0.0):
        yield


@contextlib.contextmanager
def _held(file: Path, what: object, patience: float) -> Iterator[None]:
    ends = time.monotonic() + patience
    with writing(what, "name another folder"):
        new = [path for path in file.parents if not path.exists()]
        held = _locked(file, what, ends)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()  # while it is held: who waits for it will see that it is gone
        os.close(held)
        with contextlib.suppress(OSError):  # something stands there, as it should
            for path in new:
                path.rmdir()


def _locked(file: Path, what: object, ends: float) -> int:
    """A descriptor of a lock's file, locked, with our name in it; ends: by `time.monotonic`, of our patience."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:  # its last holder has just removed the folder
            continue
        try:
            if not _lock(held):
                if time.monotonic() >= ends:
                    raise UserError(_refusal(file, what))
                time.sleep(PAUSE)
            elif is_still(file, held):
                with contextlib.suppress(OSError):  # a full disk: the lock holds, though it cannot say for whom
                    os.ftruncate(held, 0)
                    os.lseek(held, 0, os.SEEK_SET)
                    os.write(held, Holder.this().written())
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)


def _lock(held: int) -> bool:
    """Take the kernel's lock on an open file; False where another process has it."""
    if sys.platform == "win32":
        os.lseek(held, 1 << 30, os.SEEK_SET)  # beyond the text: what is locked there cannot be read
        try:
            msvcrt.locking(held, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks (some network ones): what its file says must do.
        return not Holder.read(os.pread(held, READ, 0)).is_alive
    return True


def _refusal(file: Path, what: object) -> str:
    try:
        holder = Holder.read(file.read_bytes()[:READ])
    except OSError:
        holder = Holder()
    gone = f"; if that process is gone, remove {file}" if holder.host not in ("", socket.gethostname()) else ""
    return f"{what} is being written by {holder}; wait for it, or end it, or name another folder{gone}"
