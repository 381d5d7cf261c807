"""`python -m eval demo --ckpt CKPT`: prompts of three kinds answered as users get them, then the comparison.

`make demo` runs it: vanilla decoding, EAGLE-2 with the full vocabulary, FR-Spec with the same tree in every round as in
its paper, and FR-Spec as users get it: with a pace, whose rounds draft and verify what pays, and with the V' and the
slots for ids of the text that suit that. All with the same prompts in the same run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.commands.flags import add_json_argument, decoding_request
from eval.commands.speed import compare, show
from eval.methods.side_by_side import methods
from eval.runs import provenance
from eval.runs.provenance import save
from eval.show import plots
from frspec_jax import compile_cache
from frspec_jax.api import Draft
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.commands import results_console
from frspec_jax.errors import UserError
from frspec_jax.flags import add_dtype_flag

PROMPTS = {
    "code": "Write a Python function that counts the vowels in a string.",
    "translation": "Translate German to English: Wie schön, dass der Frühling endlich da ist und alle Vögel singen.",
    "open chat": "What are the main differences between cats and dogs?",
}
WIDTH = 40  # characters of the longest bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--draft", metavar="NAME", help="a draft's name or folder (default: the first that the checkpoint had)"
    )
    parser.add_argument(
        "--draft-vocab",
        metavar="N",
        help="FR-Spec's V', a number or a share (default: 1/4; with a pace, what suits)",
    )
    add_dtype_flag(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer (default: 128)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    request = decoding_request(args)
    compile_cache.enable()
    checkpoint = Checkpoint.open(args.ckpt)
    if checkpoint.draft_folder(args.draft) is None:
        raise UserError(f"{args.ckpt} holds no draft to show; add one with python -m train eagle or convert eagle")
    drafts = [
        Draft(args.draft, "full", pace="fixed"),
        Draft(args.draft, args.draft_vocab or "1/4", pace="fixed"),
        Draft(args.draft, args.draft_vocab, pace="auto"),
    ]
    models = methods(checkpoint, drafts, dtype=args.dtype)
    console = results_console()
    *_, as_it_comes = models.values()
    with Console(stderr=True).status("compiling, once for this machine"):
        for model in models.values():
            model.warm_up()
    for prompt in PROMPTS.values():
        console.print(f"\n{prompt}", style="bold")
        stream = as_it_comes.stream(prompt, request)
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        assert stream.result is not None
        console.print(f"\n{stream.result.summary()}", style="dim", highlight=False)
    console.print()
    prompts = [as_it_comes.encode(prompt) for prompt in PROMPTS.values()]
    figures = compare(models, prompts, request, list(PROMPTS))
    show(figures)
    console.print(bars(figures["methods"]))
    console.print(said(figures["methods"]), highlight=False)
    save(args.json, figures)
    if args.json is not None:
        drawn, (axis,) = plots.figure(7.0, 2.6)
        names = [row["name"] for row in figures["methods"]]
        plots.bars(axis, names, [speed_up(row) for row in figures["methods"]], digits=2)
        axis.set_xlabel("times as fast as vanilla decoding, over three prompts")
        title = plots.heading(checkpoint.path.resolve().name, provenance.machine())
        axis.set_title(title, fontsize="medium", loc="left")
        plots.save(drawn, args.json.parent, args.json.stem)


def speed_up(row: dict[str, Any]) -> float:
    """Over all prompts, each counting alike."""
    kinds = row["by_task"].values()
    return sum(kinds) / len(kinds)


def bars(rows: list[dict[str, Any]]) -> Table:
    """A bar a method: how many times as fast as vanilla."""
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 1, 0, 0))
    longest = max(speed_up(row) for row in rows)
    for row in rows:
        bar = Text("█" * max(1, round(WIDTH * speed_up(row) / longest)), style="cyan")
        table.add_row(row["name"], bar.append(f" {speed_up(row):.2f}×", style="bold"))
    return table


def said(rows: list[dict[str, Any]]) -> str:
    """What was won, and why, in a sentence."""
    vanilla, full, cropped, ours = ({"speed": speed_up(row)} | row for row in rows)
    won = "as fast as" if abs(ours["speed"] - 1) < 0.005 else f"{ours['speed']:.2f} times as fast as"
    same = "with the same text" if ours["identical_to_vanilla"] else "though with ANOTHER TEXT, which is a fault"
    why = (
        f"a head of {cropped['draft_vocab']:,} instead of {full['draft_vocab']:,} rows makes a draft "
        f"{full['draft_ms'] / max(cropped['draft_ms'], 0.01):.1f} times as quick, and each round drafts and verifies "
        "only what pays, tokens that stand in the text already among it"
    )
    assert vanilla["name"] == "vanilla"
    return f"FR-Spec as it comes is {won} plain decoding here, {same}: {why}."
