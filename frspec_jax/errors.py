"""Errors that are the user's to mend, and how a command line reports them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """A mistake in the input: one sentence that names the flag or file, and the mend."""


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn `UserError` into one line on stderr and exit status 2, and Ctrl-C into status 130."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away (`| head`): not an error of ours
        sys.stderr.close()
        sys.exit(0)
