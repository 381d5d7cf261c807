"""Run code that a model has written: in a process of its own, with limits on time, memory and files, and no network.

The process leaves the machine's network (a Linux namespace of its own), gives up root where it has
it, and refuses to start programs, to end others, and to write or remove files (`inside.py`). These
keep an honest model's mistakes from doing harm; they are no prison for code that means harm, for
which a virtual machine is the place.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from frspec_jax.errors import UserError

CHILD = Path(__file__).with_name("inside.py")
SECONDS = 10.0
MEGABYTES = 1024
MODULES = "import collections, heapq, itertools, math, re, string, typing"
RARE = "import colorsys"  # of the standard library, and not among what is imported beforehand (`inside.COMMON`)


def passes(program: str, seconds: float = SECONDS, megabytes: int = MEGABYTES) -> bool:
    """Whether a program runs to its end, without an exception, within its limits."""
    return _run(program, seconds, megabytes)[0]


def check() -> None:
    """See that programs can be run here at all, and within limits.

    Raises:
      UserError: the system does not let a process leave the network, or such a process cannot run Python.

    Where the standard library can be imported in part only, a line on standard error says so.
    """
    done, reason = _run(MODULES, 60.0, MEGABYTES)
    if not done:
        raise UserError(
            f"--execute cannot run code safely on this system ({reason}); "
            "use Linux, as root or with user namespaces allowed, or leave the flag out"
        )
    if not _run(RARE, 60.0, MEGABYTES)[0]:
        print(
            f"note: --execute: code that is judged can import only the usual modules of the standard library, since "
            f"{sys.base_prefix} is not readable for everybody; answers that import others count as wrong",
            file=sys.stderr,
        )


def _run(program: str, seconds: float, megabytes: int) -> tuple[bool, str]:
    """Whether the program got to its end; and, if not, the last line that it said."""
    token = secrets.token_hex(16)  # what the child says at the end, which the program cannot know
    with tempfile.TemporaryDirectory() as empty:
        Path(empty).chmod(0o755)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD), str(megabytes), str(int(seconds) + 1)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=empty,
            env={},
            start_new_session=True,
            text=True,
            errors="replace",
        )
        try:
            out, err = process.communicate(f"{token}\n{program}", timeout=seconds)
        except subprocess.TimeoutExpired:
            out, err = "", f"no end within {seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
    lines = err.strip().splitlines()
    return out.endswith(f"{token}\n"), lines[-1] if lines else f"it ended with status {process.returncode}"
