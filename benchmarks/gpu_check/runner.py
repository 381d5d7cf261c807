"""Steps with time limits, in a process of their own; what they find is on disk as soon as they say it.

JAX starts once, in the worker, for all steps. A step that runs out of its time is ended with its process, since neither
XLA's compiler nor a kernel that hangs can be interrupted otherwise, and another worker goes on with the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import importlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LEAST = 3.0  # seconds: with less left, a step is not begun


@dataclasses.dataclass(frozen=True)
class Step:
    """Something to be found out."""

    name: str
    limit: float  # seconds
    run: str  # MODULE:FUNCTION, which is given a `Session`; a name, since the process that waits needs no JAX
    xla_flags: str = ""  # another value than the step before had takes another worker


@dataclasses.dataclass
class Session:
    """What a step is given."""

    out: Path
    archive: Path  # what was gathered beforehand
    work: Path  # for what no one wants to keep
    dry: bool
    tell: Callable[[str, Any], None]  # a figure by its name: to be called as soon as there is one
    deadline: float = 0.0  # of this step, on the clock of `time.monotonic`
    held: dict[str, Any] = dataclasses.field(default_factory=dict)  # what steps leave for one another, if it is there

    @property
    def left(self) -> float:
        """Seconds that this step still has."""
        return self.deadline - time.monotonic()


class Record:
    """The figures of a part: one JSON file, whole after every one of them."""

    def __init__(self, file: Path, command: str) -> None:
        self.file = file
        self.data: dict[str, Any] = {
            "command": command,
            "date": datetime.date.today().isoformat(),
            "steps": [],
            "figures": {},
        }

    def add(self, step: str, name: str, value: Any) -> None:
        """Keep a figure. "about" holds for the whole part: the machine and the versions."""
        if name == "about":
            self.data = value | self.data
        else:
            self.data["figures"].setdefault(step, {})[name] = value
        self._write()

    def ended(self, step: Step, outcome: str, seconds: float) -> None:
        flags = {"xla_flags": step.xla_flags} if step.xla_flags else {}
        self.data["steps"].append({"step": step.name, "outcome": outcome, "seconds": round(seconds, 1), **flags})
        self._write()

    def _write(self) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.file)


def run(steps: list[Step], total: float, session: dict[str, Any], record: Record) -> None:
    """Run steps one after the other, within `total` seconds; session: the first four fields of a `Session`."""
    end = time.monotonic() + total
    worker: _Worker | None = None
    for step in steps:
        begun = time.monotonic()
        limit = min(step.limit, end - begun)
        if limit < LEAST:
            record.ended(step, "no time left", 0)
            continue
        print(f"== {step.name}, {limit:.0f} s at most", flush=True)
        if worker is not None and worker.xla_flags != step.xla_flags:
            worker.stop()
            worker = None
        worker = worker or _Worker(session, step.xla_flags)
        outcome, alive = worker.take(step, begun + limit, record)
        if not alive:
            worker.stop()
            worker = None
        seconds = time.monotonic() - begun
        print(f"== {step.name}: {outcome}, {seconds:.1f} s", flush=True)
        record.ended(step, outcome, seconds)
    if worker is not None:
        worker.stop()


class _Worker:
    """A process that runs steps."""

    def __init__(self, session: dict[str, Any], xla_flags: str) -> None:
        self.xla_flags = xla_flags
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_work, args=(session, xla_flags, there), daemon=True)
        self._process.start()
        there.close()  # so that its end is seen here when the process ends

    def take(self, step: Step, deadline: float, record: Record) -> tuple[str, bool]:
        """Have a step run, and keep what it says: its outcome, and whether the worker can go on."""
        self._here.send((step, deadline - time.monotonic()))
        while self._here.poll(max(0.0, deadline - time.monotonic())):
            try:
                kind, name, value = self._here.recv()
            except (EOFError, OSError):
                self._process.join(5)
                return f"failed (the process ended with status {self._process.exitcode})", False
            if kind == "end":
                return name, True
            record.add(step.name, name, value)
        return "stopped, out of time", False

    def stop(self) -> None:
        self._here.close()
        self._process.kill()
        self._process.join()


def _work(session: dict[str, Any], xla_flags: str, there: Connection) -> None:
    """The worker: takes steps until the pipe is closed."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch needs memory too
    os.environ["FRSPEC_JAX_CACHE"] = str(session["out"])  # where tables of kernels go, and come from
    os.environ["XLA_FLAGS"] = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), xla_flags)))
    if session["dry"]:
        os.environ["JAX_PLATFORMS"] = "cpu"
    told = False
    mine = Session(**session, tell=lambda name, value: there.send(("figure", name, value)))
    while True:
        try:
            step, seconds = there.recv()
        except EOFError:
            return
        mine.deadline = time.monotonic() + seconds
        try:
            if not told:
                mine.tell("about", _about())
                told = True
            module, _, name = step.run.partition(":")
            getattr(importlib.import_module(module), name)(mine)
            outcome = "passed"
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            mine.tell("error", traceback.format_exc()[-2000:])
            outcome = f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        gc.collect()
        with contextlib.suppress(OSError):
            there.send(("end", outcome, None))


def _about() -> dict[str, Any]:
    """Where figures come from."""
    from eval.runs.provenance import machine, versions

    return {"machine": machine(), "versions": versions(), "xla_flags": os.environ["XLA_FLAGS"]}
