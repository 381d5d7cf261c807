"""Other Python processes, which hold what a test is refused, and can be killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOLD = "import sys, time, pathlib, frspec_jax.files as f, frspec_jax.locks as locks\n"
LOCKED = """with locks.folder_lock(pathlib.Path(sys.argv[1])):
    print('ready', flush=True)
    time.sleep(float(sys.argv[2]))
"""


def child(code: str, *args: Any) -> subprocess.Popen[str]:
    """Another Python that runs `code` and then says that it is ready; killed by the caller."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + code, *map(str, args)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@contextlib.contextmanager
def running(code: str, *args: Any) -> Iterator[subprocess.Popen[str]]:
    """The same, killed (kill -9) at the end at the latest."""
    process = child(code, *args)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def holding(folder: Path, seconds: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder."""
    with running(LOCKED, folder, seconds) as process:
        yield process
