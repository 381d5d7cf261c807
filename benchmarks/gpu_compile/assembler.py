"""What becomes of each kernel of ours: registers and spills as NVIDIA's assembler tells them, grid and shared memory.

XLA runs `ptxas` as a program of its own. It is given one that passes everything on, asks it to speak (-v), and keeps
what it says. How a kernel is launched stands in the sequence that XLA writes beside its dump. Mosaic GPU calls the
assembler by itself, and writes what it said, and what it reserved, to a folder that the environment names.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nvidia

SCRIPT = """#!/bin/sh
said=$(mktemp "{log}/XXXXXX")
"{ptxas}" -v "$@" 2>"$said"
status=$?
cat "$said" >&2
exit $status
"""
ENTRY = re.compile(
    r"Compiling entry function '([^']+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)

LAUNCHED = re.compile(r"kCustomKernel .*?\] (\w+) grid: \[([^]]*)\] threads: \[(\d+).*?shared_memory: (\d+)")
THREADS, RESERVED = re.compile(r"\.maxntid (\d+)"), re.compile(r"smem_scratch_bytes=(\d+)")


class Assembler:
    """A folder with a `ptxas` that is listened to, and with what XLA writes of a program."""

    def __init__(self, folder: Path) -> None:
        real = next(Path(base) / "cuda_nvcc" for base in nvidia.__path__ if (Path(base) / "cuda_nvcc").is_dir())
        self._log, self._dump, self._mosaic = folder / "said", folder / "dump", folder / "mosaic"
        self._log.mkdir()
        self._mosaic.mkdir()
        self.environment = {
            "MOSAIC_GPU_DUMP_TO": str(self._mosaic),
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "MOSAIC_GPU_DUMP_RESOURCES": "1",
        }
        (folder / "bin").mkdir()
        (folder / "nvvm").symlink_to(real / "nvvm")
        script = folder / "bin" / "ptxas"
        script.write_text(SCRIPT.format(log=self._log, ptxas=real / "bin" / "ptxas"))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        self.options: dict[str, Any] = {
            "xla_gpu_enable_libnvptxcompiler": False,
            "xla_gpu_cuda_data_dir": str(folder),
            "xla_dump_to": str(self._dump),
        }

    def heard(self) -> list[dict[str, Any]]:
        """Of each kernel compiled since the last call: registers a thread, spills, threads, shared memory, and grid.

        (Of a kernel in Mosaic GPU no grid: it stands in its own code for the host.)
        """
        found: dict[str, dict[str, Any]] = {}
        for file in sorted(self._log.iterdir()):
            for name, stored, loaded, registers in ENTRY.findall(file.read_text()):
                found[name] = {"kernel": name, "registers": int(registers), "spilled": int(stored) + int(loaded)}
            file.unlink()
        for file in self._dump.glob("*.thunk_sequence.txt"):
            for name, grid, threads, shared in LAUNCHED.findall(file.read_text()):
                if name in found:
                    launched = {"grid": [int(n) for n in grid.split(",")], "threads": int(threads)}
                    found[name] |= launched | {"shared_memory": int(shared)}
        shutil.rmtree(self._dump, ignore_errors=True)
        return [*found.values(), *self._heard_of_mosaic()]

    def _heard_of_mosaic(self) -> Iterator[dict[str, Any]]:
        for said in sorted(self._mosaic.glob("*.ptxas")):
            ((_, stored, loaded, registers),) = ENTRY.findall(said.read_text())
            (threads,) = THREADS.findall(said.with_suffix(".ptx").read_text())
            (shared,) = RESERVED.findall(said.with_suffix(".resources.txt").read_text())
            yield {
                "kernel": f"{said.stem} (Mosaic GPU)",
                "registers": int(registers),
                "spilled": int(stored) + int(loaded),
                "threads": int(threads),
                "shared_memory": int(shared),
            }
        for file in self._mosaic.iterdir():
            file.unlink()


@contextlib.contextmanager
def listening() -> Iterator[Assembler]:
    """An assembler that is listened to, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="frspec-jax-ptxas-") as folder:
        assembler = Assembler(Path(folder))
        before = {name: os.environ.get(name) for name in assembler.environment}
        os.environ.update(assembler.environment)
        try:
            yield assembler
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
