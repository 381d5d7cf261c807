"""Where a round's time goes, kernel by kernel."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from benchmarks.gpu_check.runner import Session

WANTED = ("all", "xla", "vanilla, all")
ROUNDS = 4
TOP = 60  # kernels that are told
SMALL = 8 * 2**20  # bytes of a trace that is kept


def profile(session: Session) -> None:
    """Traces of programs that the step before has left behind."""
    programs = session.held.get("programs", {})
    found = [name for name in WANTED if name in programs]
    if not found:
        raise RuntimeError("no program is left of the rounds before; see their outcome")
    for name in found:
        programs[name].run(1)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                programs[name].run(ROUNDS)
            trace = next(Path(folder).rglob("*.xplane.pb"))
            session.tell(name, {"rounds": ROUNDS, "kernels": by_kernel(trace, "CPU" if session.dry else "GPU")})
            if name == found[0] and trace.stat().st_size < SMALL:
                shutil.copy(trace, session.out / "all.xplane.pb")


def by_kernel(trace: Path, device: str) -> list[dict[str, Any]]:
    """Launches and microseconds by line and kernel, the longest first."""
    rows: dict[tuple[str, str], list[float]] = {}
    for plane in ProfileData.from_file(str(trace)).planes:
        if device not in plane.name:
            continue
        for line in plane.lines:
            for event in line.events:
                row = rows.setdefault((line.name.split("(")[0], event.name), [0, 0.0])
                row[0] += 1
                row[1] += event.duration_ns / 1e3
    longest = sorted(rows.items(), key=lambda row: -row[1][1])[:TOP]
    return [
        {"line": line[:40], "kernel": kernel[:120], "launches": int(count), "us": round(us, 1)}
        for (line, kernel), (count, us) in longest
    ]
