"""`make gpu-archive`: all that the two parts read, in one folder that can be carried to a machine without network.

The code as committed (neither assets nor results, which no part reads), the demo's model in two halves, prompts, and
the one package that a machine with JAX, transformers and PyTorch is likely to lack. Says what it gathered, how big it
is, and the two commands.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_check import layout, prompts
from frspec_jax.errors import UserError, reported

ROOT = Path(__file__).parents[2]
LIMIT = 64 * 2**20  # bytes that the copy of a part may weigh
LEFT_OUT = ("assets", "results", "*.png", "*.svg")
WHEELS = ("gguf==0.19.0",)
PYTHON = "3.12"  # of the machine with the GPU
RUN = """#!/usr/bin/env bash
# {part} on a machine with a GPU: figures go to $OUT, or to results/gpu-check in the folder that this is run in.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export OUT=${{OUT:-$PWD/results/gpu-check}} PYTHONUNBUFFERED=1
code=$(mktemp -d)
tar -xzf "$here/code.tar.gz" -C "$code"
cd "$code"
exec env PYTHONPATH="$code" "${{PYTHON:-python3}}" -m benchmarks.gpu_check {part} --archive "$here/.." "$@"
"""


def gather(out: Path, model: Path, conversations: list[Path]) -> None:
    """Make the folder anew.

    Raises:
      UserError: the model is not there, or a command failed.
    """
    if not model.is_file():
        raise UserError(f"--model {model} is no file; make gpu-archive brings it")
    shutil.rmtree(out, ignore_errors=True)
    data = model.read_bytes()
    half = -(-len(data) // 2)
    for number, name in enumerate(layout.HALVES):
        part = (out / name).parent
        part.mkdir(parents=True)
        (out / name).write_bytes(data[number * half : (number + 1) * half])
        code = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={(part / 'code.tar.gz').resolve()}"]
        _run([*code, "HEAD", "--", ".", *(f":!{pattern}" for pattern in LEFT_OUT)])
        (part / "run.sh").write_text(RUN.format(part=part.name))
    with lzma.open(out / layout.PROMPTS, "wt", encoding="utf-8") as file:
        for text in prompts.made(conversations):
            file.write(json.dumps({"prompt": text}, ensure_ascii=False) + "\n")
    wheels = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--dest", str(out / layout.WHEELS)]
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *wheels, *WHEELS])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command[:4])} ... failed: {done.stderr.strip()[-300:]}")


def show(out: Path) -> bool:
    """What there is, part by part; whether every part is small enough."""
    small = True
    table = Table("file", "MiB", title=f"{out}")
    for part in sorted(out.iterdir()):
        files = sorted(path for path in part.rglob("*") if path.is_file())
        total = sum(path.stat().st_size for path in files)
        for path in files:
            table.add_row(str(path.relative_to(out)), f"{path.stat().st_size / 2**20:.2f}")
        table.add_row(f"{part.name}, all of it", f"{total / 2**20:.2f}", end_section=True)
        small &= total <= LIMIT
    console = Console()
    console.print(table)
    with lzma.open(out / layout.PROMPTS, "rb") as file:
        console.print(f"{sum(1 for _ in file):,} prompts. The code is that of the last commit.")
    for part in sorted(out.iterdir()):
        console.print(f"on the machine with the GPU: bash {out.name}/{part.name}/run.sh")
    return small


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check.archive",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-archive", help="default: build/gpu-archive")
    parser.add_argument("--model", type=Path, default=ROOT / "material" / layout.GGUF, help="the model's GGUF file")
    parser.add_argument(
        "--prompts", type=Path, nargs="*", default=[], help="conversations whose first turns are prompts too"
    )
    args = parser.parse_args()
    gather(args.out, args.model, args.prompts)
    if not show(args.out):
        raise UserError(f"a part weighs more than {LIMIT // 2**20} MiB; give fewer --prompts")


if __name__ == "__main__":
    with reported():
        main()
