"""Errors that are the user's to mend, and how a command line reports them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import sys
from collections.abc import Iterator

from frspec_jax.entry import spelled


class UserError(Exception):
    """A mistake in the input: one sentence that names the argument or file, and the mend.

    Sentences are written with the command line's flags ("--draft-vocab 5 ..."), which most of them come to. `str` of
    an error that was raised in Python says them as Python's arguments ("draft_vocab 5 ..."); `reported` prints flags.
    """

    def __str__(self) -> str:
        return in_python(self.on_the_command_line)

    @property
    def on_the_command_line(self) -> str:
        """The sentence with flags, and commands as this user types them."""
        return spelled(super().__str__())


# Where writing fails for good: a full disk or quota, a device that gave out, a stream that is closed.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)

# Flags whose argument in Python has another name.
ARGUMENTS = {
    "draft-vocab": "Draft.vocab",
    "draft-top-k": "TreeConfig.top_k",
    "tree-size": "TreeConfig.size",
    "depth": "TreeConfig.depth",
    "draft-int8": "Draft.int8",
    "copying": "Draft.copying",
    "context-slots": "Draft.context_slots",
    "ranking": "Draft.ranking",
    "lossy-typical": "Sampling.typical",
}


# A flag (the group), or what is passed over: something in quotes, which no letter touches, or a command to its end.
FLAG = re.compile(
    r"""(?<!\w)'[^']*'(?!\w) | (?<!\w)"[^"]*"(?!\w) | (?:python\ -m|\bfrspec)\ [a-z].*
    | (?<![\w-])--([a-z][a-z0-9-]*)""",
    re.X | re.S,
)


def in_python(sentence: str) -> str:
    """A sentence on flags, in the words of somebody who calls the library: "--max-new-tokens" is max_new_tokens.

    What is quoted stays as it is (see `quoted`), and so do the flags of a command that is to be typed ("run: python -m
    convert ...").
    """

    def argument(found: re.Match[str]) -> str:
        return found[0] if found[1] is None else ARGUMENTS.get(found[1], found[1].replace("-", "_"))

    return FLAG.sub(argument, sentence)


def quoted(path: object) -> str:
    """A path or name as a sentence says it and a shell reads it: in quotes where it holds a space."""
    text = str(path)
    return shlex.quote(text) if any(letter.isspace() for letter in text) else text


def without_advice() -> None:
    """Keep transformers from telling whoever has no PyTorch, at each start, that it has no models then.

    Only tokenizers are asked of it. It looks at the variable when it is imported.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn `UserError` into one line on stderr and exit status 2, and Ctrl-C into status 130."""
    without_advice()
    if sys.stderr is None:  # closed (`2>&-`): what would be said there is said nowhere
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    if sys.stdout is None:
        print("error: standard output is closed; send it to a file or a terminal", file=sys.stderr)
        sys.exit(2)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal cannot show is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error.on_the_command_line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away (`| head`): not an error of ours
        _give_up_output()
        sys.exit(0)
    except OSError as error:
        # Of a file that is opened or renamed the error has a name, and whoever writes it says more than we could.
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        _give_up_output()
        reason = error.strerror or str(error)
        print(f"error: the output cannot be written: {reason}; make room, or send it elsewhere", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, AssertionError) as error:
        if not _no_device(error):
            raise
        asked = os.environ.get("JAX_PLATFORMS", "")
        print(f"error: JAX_PLATFORMS={asked} names a device that is not there; unset it, or name cpu", file=sys.stderr)
        sys.exit(2)


def _no_device(error: BaseException) -> bool:
    """Whether JAX found none of the platforms that it was told to use: it says so, or trips over an assertion."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    inside = at is not None and at.tb_frame.f_code.co_filename.endswith("xla_bridge.py")
    return "JAX_PLATFORMS" in os.environ and (inside or "Unable to initialize backend" in str(error))


def _give_up_output() -> None:
    """Send what is still buffered nowhere, so that Python does not stumble over it as it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
