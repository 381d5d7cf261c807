"""The launch ledger: what a program would launch on an H100, read off what XLA compiles for one where there is none.

    python -m benchmarks.gpu_compile                        the programs that are watched, to results/gpu-compile
    python -m benchmarks.gpu_compile --check                and whether each keeps its budget
    python -m benchmarks.gpu_compile --what round --model llama3-8b --layers 4 --kernels all      one program
    python -m benchmarks.gpu_compile --diff OLD.json NEW.json                                     what a change did

It counts launches and bytes. It measures no time, and models none: the floor that the picture shows is what the bytes
would take at the memory's rated bandwidth. It needs `jax[cuda12]`, whose libraries come as wheels, and no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.gpu_compile import picture
from eval.runs import provenance
from frspec_jax import files
from frspec_jax.errors import UserError, reported
from frspec_jax.presets import model_config
from frspec_jax.sharding import Split
from pallas_kernels.models import SHAPES

ROOT = Path(__file__).parents[2]
KERNELS = ("auto", "xla", "attention", "attention and head", "all", "mosaic")
CASE = ("what", "model", "layers", "draft_vocab", "slots", "kernels", "texts", "context", "devices")  # a flag each
ROUNDS = ("round", "paced", "batch")  # what drafts
READ_BY = {  # which programs a flag says something of, where that is not all of them
    "draft_vocab": ROUNDS,
    "slots": ROUNDS,
    "texts": ("batch",),
    "kernels": (*ROUNDS, "vanilla", "prefill"),
    "context": (*ROUNDS, "vanilla", "prefill"),
    "devices": ("round", "paced", "vanilla"),
}
FLAGS = {"devices": "tensor-parallel"}  # whose names are not the case's own
BUDGETS = Path(__file__).parent / "budgets.json"


def watched() -> list[dict[str, Any]]:
    """What is compiled by default: the cases with a budget, and a few that are only looked at."""
    budgets = json.loads(BUDGETS.read_text())["budgets"]
    looked_at = [
        {"kernels": "all", "split_k": True},
        {"kernels": "all", "rule": "sampled"},
        {"what": "prefill"},
        {"what": "train", "model": "smollm2-135m"},
    ]
    return budgets + [{"case": case} for case in looked_at]


def compile_all(wanted: list[dict[str, Any]], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The ledger of each case."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise UserError("jax[cuda12] is not installed here; `make gpu-compile` makes an environment that has it")
    jax.config.update("jax_platforms", "cpu")  # the device at hand; what is compiled for is told
    from benchmarks.gpu_compile import assembler, ledger, programs

    entries = []
    with assembler.listening() as listener:
        for one in track(wanted, "compiling", console=Console(stderr=True)):
            case = programs.Case(**one["case"])
            if case.draft_vocab > programs.SHAPES[case.model].vocabulary:
                raise UserError(f"--draft-vocab {case.draft_vocab} is more than {case.model} has; give less, or full")
            try:
                done = programs.compiled(case, listener.options | options)
            except jax.errors.JaxRuntimeError as error:
                if "compile option" not in str(error):
                    raise
                raise UserError(f"--set: {str(error).splitlines()[0]}; give one of XLA's options") from None
            layers = case.layers or programs.SHAPES[case.model].layers
            kernels = [k for k in listener.heard() if "shared_memory" in k and programs.ours(k["kernel"])]
            entry = {
                "name": case.name,
                "case": dataclasses.asdict(case),
                **ledger.ledger(done, layers),
                "kernels": kernels,
            }
            entry["over_budget"] = ledger.over_budget(entry, one) if "launches" in one else []
            entries.append(entry)
    return entries


def summary(entries: list[dict[str, Any]]) -> Table:
    table = Table(title="Compiled for an H100: launches of one round, step, chunk or training step")
    table.add_column("program", min_width=44)
    for heading in ("launches", "a layer", "loops", "waits", "GB read", "MiB temporaries", "most registers", "spilled"):
        table.add_column(heading, justify="right")
    for entry in entries:
        registers = max((kernel["registers"] for kernel in entry["kernels"]), default=0)
        table.add_row(
            entry["name"],
            str(entry["launches"]),
            f"{entry['launches_a_layer']:.1f}",
            str(len(entry["loops"])),
            str(entry["waits"]),
            f"{entry['read'] / 1e9:.2f}",
            f"{entry['temporaries'] / 2**20:.0f}",
            str(registers or "-"),
            str(sum(kernel["spilled"] for kernel in entry["kernels"])),
        )
    return table


def by_stage(entry: dict[str, Any]) -> Table:
    table = Table("stage", title=entry["name"])
    for heading in ("launches", "MB read", "MB written"):
        table.add_column(heading, justify="right")
    table.add_column("of")
    for stage in entry["stages"]:
        of = ", ".join(f"{count} {what}" for what, count in stage["of"].items())
        sizes = (f"{stage[key] / 1e6:,.1f}" for key in ("read", "written"))
        table.add_row(stage["stage"], str(stage["launches"]), *sizes, of)
    return table


def crossings(entries: list[dict[str, Any]]) -> Table:
    """What crosses devices in a round, and what each of them holds."""
    table = Table("program", "GiB a device", title="Over several devices")
    for heading in ("stage", "of"):
        table.add_column(heading)
    table.add_column("MB of results", justify="right")
    for entry in entries:
        held = f"{(entry['held'] + entry['temporaries']) / 2**30:.1f}"
        for at, crossing in enumerate(entry["collectives"]):
            of = ", ".join(f"{count} {what}" for what, count in crossing["of"].items())
            first = (entry["name"], held) if at == 0 else ("", "")
            table.add_row(*first, crossing["stage"], of, f"{crossing['bytes'] / 1e6:,.3f}")
    return table


def difference(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> Table:
    """Launches by stage, before and after, of the programs that both ledgers have."""
    table = Table("program", "stage", title="Launches, before and after")
    for heading in ("before", "after", "change", "GB read before", "after"):
        table.add_column(heading, justify="right")
    before = {entry["name"]: entry for entry in old}
    for entry in new:
        if entry["name"] not in before:
            continue
        was = {stage["stage"]: stage for stage in [_whole(before[entry["name"]]), *before[entry["name"]]["stages"]]}
        now = {stage["stage"]: stage for stage in [_whole(entry), *entry["stages"]]}
        for name in dict.fromkeys([*was, *now]):
            a, b = (side.get(name, {"launches": 0, "read": 0}) for side in (was, now))
            if a["launches"] != b["launches"] or a["read"] != b["read"]:
                change = b["launches"] - a["launches"]
                sizes = (f"{side['read'] / 1e9:.3f}" for side in (a, b))
                table.add_row(entry["name"], name, str(a["launches"]), str(b["launches"]), f"{change:+d}", *sizes)
    return table


def _whole(entry: dict[str, Any]) -> dict[str, Any]:
    return {"stage": "all", "launches": entry["launches"], "read": entry["read"]}


def check(case: dict[str, Any]) -> None:
    """Refuse a case of which a flag says nothing, or which cannot be.

    Raises:
      UserError: names the flag.
    """
    what, model = case.get("what", "round"), case.get("model", "llama3-8b")  # as `programs.Case` has them
    for name, kinds in READ_BY.items():
        if name in case and what not in kinds:
            flag = FLAGS.get(name, name.replace("_", "-"))
            raise UserError(f"--{flag} says nothing of --what {what}; drop it, or give it with {', '.join(kinds)}")
    Split(model_config(model), case.get("devices", 1))


def _ledger_at(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text("utf-8"))["programs"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--diff {path} is no ledger ({error}); give a file that this command has written") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--what", choices=("round", "paced", "vanilla", "batch", "prefill", "train"), help="one program of this kind"
    )
    parser.add_argument(
        "--model", metavar="NAME", choices=SHAPES, help="its sizes, of pallas_kernels/models.py (default: llama3-8b)"
    )
    parser.add_argument("--layers", type=_at_least_1, metavar="L", help="so many of the model's layers (default: all)")
    parser.add_argument(
        "--draft-vocab", type=_vocabulary, metavar="V'", help="ids of the draft's head, or full (default: 32768)"
    )
    parser.add_argument(
        "--slots", type=_at_least_1, metavar="M", help="of the draft, for ids of the text (default: none)"
    )
    parser.add_argument(
        "--kernels", choices=KERNELS, help="which run as kernels (default: auto); mosaic: all, attention in Mosaic GPU"
    )
    parser.add_argument("--texts", type=_at_least_1, metavar="B", help="of a batch (default: 16)")
    parser.add_argument("--context", type=_at_least_1, metavar="N", help="tokens in the cache (default: 1024)")
    parser.add_argument(
        "--tensor-parallel", dest="devices", type=_at_least_1, metavar="N", help="devices that divide it (default: 1)"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="XLA's options")
    parser.add_argument("--check", action="store_true", help="exit with status 1 where a program is over its budget")
    parser.add_argument("--diff", nargs=2, type=Path, metavar="FILE", help="two ledgers to hold side by side")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "gpu-compile", help="folder of ledger and picture"
    )
    args = parser.parse_args()
    console = Console()
    if args.diff:
        console.print(difference(*map(_ledger_at, args.diff)))
        return
    given = {name: getattr(args, name) for name in CASE}
    one = {name: value for name, value in given.items() if value is not None}
    check(one)
    files.check_writable(args.out, f"--out {args.out}")
    entries = compile_all([{"case": one}] if one else watched(), dict(map(_option, args.set)))
    for entry in entries[:1] if not one else entries:
        console.print(by_stage(entry))
    console.print(summary(entries))
    if any(entry["collectives"] for entry in entries):
        console.print(crossings(entries))
    provenance.save(args.out / "ledger.json", {"compiled_for": "NVIDIA H100 80GB HBM3", "programs": entries})
    picture.draw(entries, args.out)
    console.print(f"{args.out}/ledger.json, ledger.png")
    over = [sentence for entry in entries for sentence in entry["over_budget"]]
    for sentence in over:
        console.print(f"over budget: {sentence}")
    sys.exit(bool(over) and args.check)


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def _vocabulary(text: str) -> int:
    return 0 if text == "full" else _at_least_1(text)


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, {"true": True, "false": False}.get(value, int(value) if value.lstrip("-").isdigit() else value)


if __name__ == "__main__":
    with reported():
        main()
