"""`make gpu-check`: all that needs a GPU, in one command of ten minutes at most, without network.

The GPU tests, the sweep of the kernels (its winners become `auto`'s choice), and the rounds of
Llama 3 8B, 3.2 1B and Qwen2 7B by stage; then a short report against what the project set out to
reach. Each step has a time limit, and one that fails or runs out of it does not stop the next.
With --dry the same steps run tiny on a CPU, to show that the script itself is sound.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOTAL = 580  # seconds
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    limit: int  # seconds
    command: list[str]  # after `python`
    xla_flags: str = ""


def steps(out: Path, dry: bool) -> list[Step]:
    """What to run, most telling first: the time may not do for the last."""

    def rounds(model: str, kernels: str, *more: str, name: str = "", xla_flags: str = "") -> Step:
        file = out / f"{model}-{name or kernels}"
        command = ["-m", "eval", "stages", model, "--kernels", kernels]
        command += ["--json", f"{file}.json", "--out", str(file), *more]
        return Step(f"rounds of {model}, {name or kernels}", 150, command, xla_flags)

    if dry:
        few = ("--context", "64", "--rounds", "2", "--tree-size", "8", "--depth", "2", "--draft-top-k", "4")
        bench = ["-m", "pallas_kernels.bench", "--dry", "--json", str(out / "kernels.json")]
        tests = ["-m", "pytest", "-q", "tests/pallas_kernels/test_kernels.py", "-k", "auto", "-p", "no:cacheprovider"]
        return [Step("tests", 300, tests), Step("kernels", 300, bench), rounds("tiny", "auto", *few)]
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests"]
    sweep = ["-m", "pallas_kernels.bench", "--tune", "--shapes", "llama3-8b", "--context", "1024"]
    sweep += ["--json", str(out / "kernels.json")]
    one = ("--context", "1024", "--draft-vocab", "full,32768")
    return [
        Step("tests", 120, tests),
        Step("kernels", 180, sweep),
        rounds("llama3-8b", "auto", *one, "--peer-step"),
        rounds("llama3-8b", "xla", *one),
        rounds("llama3-8b", "pallas", *one),
        rounds("llama3-8b", "auto", *one, "--draft-int8", name="int8"),
        # The decode loop itself as a CUDA graph: off by default in XLA, on if it is worth it.
        rounds("llama3-8b", "auto", *one, name="graph", xla_flags="--xla_gpu_enable_command_buffer=+WHILE"),
        rounds("llama3.2-1b", "auto", *one),
        rounds("qwen2-7b", "auto", *one),
    ]


def run(step: Step, left: float, log: Path) -> dict[str, Any]:
    """Run one step; its outcome, seconds and command. Its output goes to `log`, and to the terminal."""
    limit = min(step.limit, left)
    start = time.perf_counter()
    outcome = "no time left"
    if limit > 5:
        print(f"== {step.name}", flush=True)
        with open(log, "wb") as file:
            try:
                done = subprocess.run(
                    [sys.executable, *step.command],
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    env={**os.environ, **ENVIRONMENT, "XLA_FLAGS": step.xla_flags},
                    check=False,
                )
                outcome = "passed" if done.returncode == 0 else f"failed (exit status {done.returncode})"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {limit:.0f} s"
        print(log.read_text(errors="replace")[-6000:], flush=True)
    seconds = round(time.perf_counter() - start, 1)
    return {"step": step.name, "outcome": outcome, "seconds": seconds, "command": "python " + " ".join(step.command)}


def targets(out: Path) -> list[str]:
    """What the rounds of Llama 3 8B were to reach, beside what was measured: lines of a Markdown table."""
    file = out / "llama3-8b-auto.json"
    if not file.exists():
        return ["| rounds of llama3-8b | not measured | |"]
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    full, cropped, vanilla = rows["EAGLE-2"], rows["FR-Spec 32,768"], rows["vanilla"]

    def ratio(*names: str) -> float:
        chosen = [stage for stage in cropped["stages"] if stage["stage"] in names]
        return sum(stage["us"] for stage in chosen) / sum(stage["floor_us"] for stage in chosen)

    figures = [
        ("verify of 60 nodes, × floor", ratio("verify: layers", "verify: head"), 1.15, False),
        ("a draft level (layer, 32k head, top-k), × floor", ratio("level: layer", "level: head, top-k"), 1.5, False),
        ("round with V' = 32k, × floor", cropped["times_floor"], 1.25, False),
        ("round with V' = 32k, ms", cropped["round_us"] / 1e3, 7.5, False),
        ("vanilla step, × floor", vanilla["times_floor"], 1.10, False),
        ("full-vocabulary round over the 32k round", full["round_us"] / cropped["round_us"], 1.15, True),
    ]
    return [
        f"| {name} | {value:.3f} | {'at least' if more else 'at most'} {bar}: "
        f"{'reached' if (value >= bar) == more or value == bar else 'missed'} |"
        for name, value, bar, more in figures
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run all that needs a GPU, within ten minutes, and report.")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu-check", help="folder of logs and figures")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU: shows that the script is sound")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be made: {error.strerror}; name another folder")
    start = time.perf_counter()
    done = []
    for number, step in enumerate(steps(args.out.resolve(), args.dry)):
        done.append(run(step, TOTAL - (time.perf_counter() - start), args.out / f"step-{number}.log"))
    lines = ["# GPU check", "", "| step | outcome | seconds | command |", "|---|---|---|---|"]
    lines += [f"| {d['step']} | {d['outcome']} | {d['seconds']} | `{d['command']}` |" for d in done]
    if not args.dry:
        lines += ["", "| Llama 3 8B sizes, bfloat16, context 1024 | measured | aim |", "|---|---|---|"]
        lines += targets(args.out)
    (args.out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(any(d["outcome"] != "passed" for d in done))


if __name__ == "__main__":
    main()
