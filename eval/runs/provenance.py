"""Where figures come from: the machine, the versions, the date and the command."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import Any

from frspec_jax import files, tuned

machine = tuned.machine


def versions() -> dict[str, str]:
    """Versions of what a measurement depends on."""
    names = ("frspec-jax", "jax", "jaxlib", "numpy", "transformers", "torch")
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def command() -> str:
    """The command line, for a reader elsewhere: of a path that is absolute only the name."""
    program = Path(sys.argv[0])
    if program.stem == "frspec" or program.parts[-2:] == ("frspec_jax", "__main__.py"):
        start = "frspec"
    else:
        start = "python -m eval" if program.name == "__main__.py" else f"python {program.parent.name}/{program.name}"
    return " ".join([start, *(Path(a).name if a.startswith("/") else a for a in sys.argv[1:])])


def save(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures as JSON, with the machine, the versions, the date and the command that they were measured with."""
    if path is None:
        return
    about = {"machine": machine(), "versions": versions()}
    about |= {"date": datetime.date.today().isoformat(), "command": command()}
    with files.writing(f"--json {path}", "name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, about | figures, f"--json {path}")
