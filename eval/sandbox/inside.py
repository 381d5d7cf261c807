"""The child of `sandbox.py`: shuts itself in, then runs the program on standard input. Imports nothing of ours.

Arguments: megabytes of memory, seconds of processor time. Standard input: a token, then the program.
The token is written to standard output once the program has run to its end.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import resource
import sys
import types
from typing import Any

# Imported while the interpreter's own files can still be read: they may be root's.
COMMON = (
    "abc", "array", "ast", "base64", "binascii", "bisect", "calendar", "cmath", "collections", "collections.abc",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "doctest", "enum", "fractions",
    "functools", "graphlib", "hashlib", "heapq", "hmac", "html", "inspect", "io", "ipaddress", "itertools", "json",
    "keyword", "locale", "logging", "math", "numbers", "operator", "os", "pathlib", "pprint", "queue", "random", "re",
    "secrets", "statistics", "string", "struct", "sys", "textwrap", "threading", "time", "timeit", "traceback", "types",
    "typing", "unicodedata", "unittest", "uuid", "warnings", "weakref", "zlib", "zoneinfo",
)  # fmt: skip
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
NOBODY = 65534
READABLE = "rbtU"  # characters of a mode that only reads
# Audit events (PEP 578) of what a program that computes an answer never does.
REFUSED = (
    "ctypes", "fcntl", "os.chmod", "os.chown", "os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.link",
    "os.mkdir", "os.posix_spawn", "os.putenv", "os.remove", "os.rename", "os.rmdir", "os.spawn", "os.symlink",
    "os.system", "os.truncate", "os.unsetenv", "pty.", "shutil.", "signal.pthread_kill", "socket.", "subprocess.",
)  # fmt: skip


def leave_network() -> None:
    """A network namespace of its own, with no interface; a user namespace too where that is what permits it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) and libc.unshare(CLONE_NEWUSER | CLONE_NEWNET):
        raise OSError(f"it cannot leave the network: {os.strerror(ctypes.get_errno())}")


def give_up_root() -> None:
    """Become nobody, where this is root."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def limit(megabytes: int, seconds: int) -> None:
    """Memory, processor time, no files written, few open, no processes begun."""
    for what, most in (
        (resource.RLIMIT_AS, megabytes * 2**20),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what REFUSED names, and files opened for writing. An audit hook cannot be taken off again."""
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is not allowed here")
    if event == "open" and (
        (isinstance(arguments[1], str) and set(arguments[1]) - set(READABLE))
        or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
    ):
        raise PermissionError("writing files is not allowed here")


def main() -> None:
    token, program = sys.stdin.readline(), sys.stdin.read()
    say = os.dup(1)
    for name in COMMON:
        importlib.import_module(name)
    leave_network()
    give_up_root()
    limit(int(sys.argv[1]), int(sys.argv[2]))
    sys.stdin, sys.stdout = io.StringIO(), io.StringIO()  # what the program prints is nobody's concern
    sys.argv = [""]
    sys.addaudithook(guard)
    # A module of its own: what stands below "if __name__ == '__main__'" is not what is judged.
    answer = sys.modules["answer"] = types.ModuleType("answer")
    exec(compile(program, "<answer>", "exec"), answer.__dict__)
    os.write(say, token.encode())


if __name__ == "__main__":
    main()
