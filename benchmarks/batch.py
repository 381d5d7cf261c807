"""What many texts at once bring: tokens a second of rounds that B texts share, against one text by itself.

    python -m benchmarks.batch --ckpt CKPT --data spec_bench/question.jsonl [--texts 1,4,16] [--draft NAME]

One text by itself is `Generator.generate`, vanilla and as users get it. Reading prompts is not counted, here or there:
only rounds in which every slot decodes are. The methods take turns, and the median of the repeats counts.
The table in docs/batch.md comes from here.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from eval.data.questions import read_questions, spread
from eval.runs import provenance
from frspec_jax import api
from frspec_jax.api import NO_DRAFT, Draft, Request
from frspec_jax.batch import Batch
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.errors import UserError, reported


def alone(model: api.Generator, prompts: list[np.ndarray], tokens: int) -> float:
    """Tokens a second of texts by themselves, one after the other."""
    results = [model.generate_ids(ids, Request(tokens)) for ids in prompts]
    return sum(len(r.tokens) - 1 for r in results) / sum(r.decode_seconds for r in results)


def together(batch: Batch, prompts: list[np.ndarray], tokens: int) -> float:
    """Tokens a second of rounds in which every slot decodes; a text that ends makes room for the next."""
    running: set[int] = set()
    waiting = itertools.cycle(prompts)
    brought, seconds = 0, 0.0
    while brought < batch.slots * tokens:
        while batch.free:
            running.add(batch.admit(next(waiting), Request(tokens)))
        counted = not batch.reading
        begun = time.perf_counter()
        fresh = batch.step()
        if counted:
            seconds += time.perf_counter() - begun
            brought += sum(len(one.tokens) for one in fresh)
        running -= {one.slot for one in fresh if one.finish_reason is not None}
    for slot in running:
        batch.cancel(slot)
    return brought / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("--draft", metavar="NAME", help="its draft (default: the first that it had)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="questions (default: the sample that ships)")
    parser.add_argument("--texts", default="1,4,8,16", metavar="B,B,...", help="at once (default: 1,4,8,16)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of each text (default: 64)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="of each slot (default: 1024)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if not all(text.isdecimal() and int(text) for text in args.texts.split(",")):
        raise UserError(f"--texts {args.texts} must be numbers of texts, such as 1,4,16")
    sizes = [int(text) for text in args.texts.split(",")]
    checkpoint, console = Checkpoint.open(args.ckpt), Console()
    vanilla = api.load(checkpoint, NO_DRAFT, context=args.context)
    drafted = api.load(checkpoint, Draft(args.draft), context=args.context, target=vanilla.weights.target)
    questions = spread(read_questions(args.data), max(sizes))
    prompts = [vanilla.encode(question.turns[0])[: args.context - args.max_new_tokens - 1] for question in questions]
    prompts = list(itertools.islice(itertools.cycle(prompts), max(sizes)))
    models = {"vanilla": vanilla, "drafted": drafted}
    runs: dict[tuple[str, int], Any] = {(name, 0): model for name, model in models.items()}
    kinds = [(name, model, size) for size in sizes for name, model in models.items()]
    for name, model, size in track(kinds, "compiling", console=console):
        runs[name, size] = Batch(model, size, sizes=(size,))
        runs[name, size].warm_up()
    few = prompts[:4]
    alone(vanilla, few[:1], 4), alone(drafted, few[:1], 4)
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for _ in track(range(args.repeats), "measuring", console=console):
        for key, run in runs.items():
            rate = together(run, prompts, args.max_new_tokens) if key[1] else alone(run, few, args.max_new_tokens)
            rates[key].append(rate)
    median = {key: statistics.median(values) for key, values in rates.items()}
    console.print(table(median, sizes, checkpoint.path.name))
    if args.json is not None:
        figures = [{"method": name, "texts": size, "tokens_per_second": rates[name, size]} for name, size in runs]
        facts = {"ckpt": checkpoint.path.name, "draft": drafted.drafting.method.name, "dtype": vanilla.dtype_name}
        provenance.save(args.json, {**facts, "max_new_tokens": args.max_new_tokens, "rates": figures})


def table(median: dict[tuple[str, int], float], sizes: list[int], name: str) -> Table:
    """Rows by how many texts; ratios to one text by itself, vanilla."""
    base = median["vanilla", 0]
    shown = Table("texts", "vanilla", "", "as users get it", "", "of vanilla", title=f"{name}: tokens a second")
    for size in (0, *sizes):
        plain, paced = median["vanilla", size], median["drafted", size]
        row = (f"{plain:.1f}", f"{plain / base:.2f}x", f"{paced:.1f}", f"{paced / base:.2f}x", f"{paced / plain:.2f}")
        shown.add_row(f"{size} in a batch" if size else "one by itself", *row)
    return shown


if __name__ == "__main__":
    with reported():
        main()
