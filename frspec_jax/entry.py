"""Where the project's commands are, and how a user types them: in the repository, and from an installed wheel.

In the repository `convert`, `train` and `eval` are folders of its root, and their commands are typed
`python -m train ...`. A wheel must not install modules of such names: a user's own train.py would hide them, or they
it. So it carries the three folders inside this package, under `bundled`, and the command `frspec` puts that folder
first on its own process's path.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
BUNDLED = PACKAGE / "bundled"  # of a wheel (pyproject.toml, package-dir); the repository has no such folder
FOLDERS = ("convert", "train", "eval")
COMMAND = re.compile(r"\bpython -m (?:frspec_jax\.)?(generate|serve|doctor|convert|train|eval)\b(?!\.)")


def installed() -> bool:
    """Whether this is a wheel, in which `python -m train` would be somebody else's."""
    return BUNDLED.is_dir()


def install(extra: str) -> str:
    """The command that brings an optional part's packages, as one of `pyproject.toml`'s extras."""
    return f"pip install 'frspec-jax[{extra}]'" if installed() else f"pip install -e '.[{extra}]'"


def root() -> Path:
    """The folder that holds `convert`, `train` and `eval`."""
    return BUNDLED if installed() else PACKAGE.parent


def spelled(sentence: str) -> str:
    """A sentence with its commands as this user types them.

    "python -m train rank" becomes "frspec train rank" for whoever has a wheel, or typed `frspec` now.
    """
    if installed() or Path(sys.argv[0] or "python").stem == "frspec":
        return COMMAND.sub(r"frspec \1", sentence)
    return sentence
