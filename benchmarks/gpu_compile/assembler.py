"""What becomes of each kernel of ours: registers and spills as NVIDIA's assembler tells them, grid and shared memory.

XLA runs `ptxas` as a program of its own. It is given one that passes everything on, asks it to speak (-v), and keeps
what it says. How a kernel is launched stands in the sequence that XLA writes beside its dump.
"""

from __future__ import annotations

import contextlib
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


class Assembler:
    """A folder with a `ptxas` that is listened to, and with what XLA writes of a program."""

    def __init__(self, folder: Path) -> None:
        real = next(Path(base) / "cuda_nvcc" for base in nvidia.__path__ if (Path(base) / "cuda_nvcc").is_dir())
        self._log, self._dump = folder / "said", folder / "dump"
        self._log.mkdir()
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
        """Of each kernel compiled since the last call: registers a thread, spills, grid, threads, shared memory."""
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
        return list(found.values())


@contextlib.contextmanager
def listening() -> Iterator[Assembler]:
    """An assembler that is listened to, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="frspec-jax-ptxas-") as folder:
        yield Assembler(Path(folder))
