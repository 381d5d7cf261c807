"""A disk that is full, for as long as a test needs one."""

from __future__ import annotations

import contextlib
import resource


@contextlib.contextmanager
def files_of(size: int):
    """No file grows beyond `size` bytes meanwhile: as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
