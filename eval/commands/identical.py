"""`python -m eval identical --ckpt CKPT --peer MODEL`: is the output that of transformers, token for token?

Greedy, every method on every prompt, in float32 unless --dtype says otherwise. Where two outputs
part, the target's two best logits there are compared: below --tie they are a near-tie, which
rounding decides.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from eval.commands.flags import add_json_argument, add_model_arguments, add_question_arguments, models
from eval.data.questions import read_questions, spread
from eval.methods import side_by_side
from eval.methods.contest import parting
from eval.methods.peers import Peer
from eval.runs.provenance import save
from frspec_jax.api import Request
from frspec_jax.commands import results_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "full,1/4,1/12", dtype="float32")
    add_question_arguments(parser, questions=42, tokens=128)
    add_json_argument(parser)
    parser.add_argument("--peer", type=Path, required=True, metavar="PATH", help="the same model: HF folder or .gguf")
    parser.add_argument(
        "--tie", type=float, default=1e-3, help="logits closer than this are a near-tie (default: 1e-3)"
    )


def run(args: argparse.Namespace) -> None:
    checkpoint, methods = models(args)
    peer = Peer(args.peer, checkpoint.stop_ids, args.dtype)
    questions = spread(read_questions(args.data), args.questions)
    prompts = [methods["vanilla"].encode(q.first) for q in questions]
    counts = {name: {"identical": 0, "near_ties": 0, "different": 0} for name in methods}
    gaps: list[dict[str, Any]] = []
    request = Request(args.max_new_tokens)
    answers = side_by_side.interleaved(methods, prompts, request)
    for question, prompt, results in zip(
        questions, track(prompts, "prompts", console=Console(stderr=True)), answers, strict=True
    ):
        expected, _ = peer.generate(prompt, args.max_new_tokens)
        for name, result in results.items():
            if result.tokens == expected:
                counts[name]["identical"] += 1
                continue
            at = parting(result.tokens, expected)
            gap = peer.gap([*prompt.tolist(), *expected[:at]])
            counts[name]["near_ties" if gap < args.tie else "different"] += 1
            gaps.append({"question": question.number, "method": name, "token": at, "gap": gap})
    table = Table(title=f"{len(prompts)} prompts, {args.max_new_tokens} tokens: held against transformers")
    for heading in ("method", "identical", f"parted at a near-tie (gap < {args.tie:g})", "different"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, row in counts.items():
        table.add_row(name, *map(str, row.values()))
    results_console().print(table)
    save(args.json, {"prompts": len(prompts), "methods": counts, "parted": gaps})
    if any(row["different"] for row in counts.values()):
        print("error: some outputs differ by more than rounding", file=sys.stderr)
        sys.exit(1)
