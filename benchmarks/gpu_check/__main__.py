"""`python -m benchmarks.gpu_check part1|part2`: all that needs a GPU, without network, and a report.

part1: bandwidth, the kernels against XLA, exactness, rounds of Llama 3 8B beside their floor, profiles, the sweep that
makes tables for `auto`, XLA's flags. Five minutes at most.
part2: a real model answers prompts, a draft is trained on its answers, and both decode. Seven minutes at most.

Figures are in OUT/part1.json and OUT/part2.json as soon as there are any, and a report in OUT/report.md.
--dry runs the same steps tiny on a CPU, kernels interpreted, to show that the script is sound.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import layout, report, runner
from benchmarks.gpu_check.runner import Step

ROOT = Path(__file__).parents[2]
HERE = "benchmarks.gpu_check"
LOOPS_AS_GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"  # off by default in XLA
TOTAL = {"part1": 290, "part2": 410}  # seconds


def steps(part: str, dry: bool) -> list[Step]:
    """What a part does, most telling first: the time may not do for the last."""
    if part == "part2":
        return [
            Step("model", 45, f"{HERE}.material:model"),
            Step("answers", 120, f"{HERE}.answers:answers"),
            Step("draft", 170, f"{HERE}.training:draft"),
            Step("real model", 150, f"{HERE}.real:real_model"),
        ]
    return [
        Step("bandwidth", 30, f"{HERE}.rounds:bandwidth"),
        Step("kernels", 50, f"{HERE}.kernels:kernels"),
        Step("exactness", 50, f"{HERE}.exactness:exactness"),
        Step("rounds", 100, f"{HERE}.rounds:rounds"),
        Step("profile", 30, f"{HERE}.profiles:profile"),
        Step("sweep", 60, f"{HERE}.sweep:sweep"),
        Step("more rounds", 70, f"{HERE}.rounds:more_rounds"),
        Step("products of PyTorch", 20, f"{HERE}.peer:products"),
        Step("4 layers", 50, f"{HERE}.rounds:few_layers"),
        Step("4 layers, loops as graphs", 40, f"{HERE}.rounds:loops_as_graphs", "" if dry else LOOPS_AS_GRAPHS),
        Step("stages", 60, f"{HERE}.rounds:stages"),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m {HERE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=TOTAL)
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "results" / "gpu-check"),
        help="folder of figures (default: OUT of the environment, or results/gpu-check)",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        default=ROOT / "build" / "gpu-archive",
        help="what `make gpu-archive` gathered (default: build/gpu-archive)",
    )
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be made: {error.strerror}; name another folder")
    command = f"python -m {HERE} {args.part}" + " --dry" * args.dry
    record = runner.Record(args.out / f"{args.part}.json", command)
    if args.part == "part1" and not args.dry:
        layout.keep(args.archive)
    try:
        with tempfile.TemporaryDirectory() as work:
            session = {"out": args.out, "archive": args.archive, "work": Path(work)}
            given: dict[str, Any] = {name: path.resolve() for name, path in session.items()} | {"dry": args.dry}
            runner.run(steps(args.part, args.dry), TOTAL[args.part], given, record)
    finally:
        print(report.written(args.out))
    sys.exit(any(step["outcome"] != "passed" for step in record.data["steps"]))


if __name__ == "__main__":
    main()
