"""What `make gpu-archive` gathers and part 1 and 2 find again: one folder, with a part of it for each.

    part1/code.tar.gz  part1/model.gguf.1
    part2/code.tar.gz  part2/model.gguf.2  part2/prompts.jsonl.xz  part2/wheels/*.whl

A copy to the machine may be limited in size, so the model comes in two halves, and what part 1 brings waits there.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HALVES = ("part1/model.gguf.1", "part2/model.gguf.2")
PROMPTS = "part2/prompts.jsonl.xz"
WHEELS = "part2/wheels"
KEPT = "frspec-jax-gpu-check"  # below the system's folder for temporary files


def keep(archive: Path) -> None:
    """Put part 1's half of the model where part 2 finds it, should the folder be replaced in between."""
    half = archive / HALVES[0]
    if half.is_file():
        kept = Path(tempfile.gettempdir()) / KEPT
        kept.mkdir(exist_ok=True)
        shutil.copy(half, kept / half.name)


def joined_model(archive: Path, checkout: Path, out: Path) -> Path:
    """The model's file: that of the checkout, or the two halves in one.

    Raises:
      FileNotFoundError: there is neither.
    """
    whole = checkout / "material" / GGUF
    if whole.is_file():
        return whole
    kept = Path(tempfile.gettempdir()) / KEPT
    with open(out, "wb") as file:
        for name in HALVES:
            places = [archive / name, kept / Path(name).name]
            half = next((place for place in places if place.is_file()), None)
            if half is None:
                raise FileNotFoundError(f"{archive / name} is not there; make gpu-archive gathers it")
            file.write(half.read_bytes())
    return out


def use_wheels(archive: Path) -> None:
    """Let Python import what the archive brings; last, so that what is installed goes first. They are pure Python."""
    sys.path += [str(wheel) for wheel in sorted((archive / WHEELS).glob("*.whl"))]
