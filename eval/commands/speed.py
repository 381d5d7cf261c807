"""`python -m eval speed --ckpt CKPT`: vanilla, EAGLE-2 and FR-Spec side by side, in one run.

Every prompt is answered by every method in turn; speeds are medians over the prompts, decoding alone.
The floor is the bytes that a round must read over the memory bandwidth measured in the same run.
With --peer, transformers decodes the same prompts too.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from eval.commands.flags import add_json_argument, add_model_arguments, add_question_arguments, decoding_request, models
from eval.data.questions import read_questions, spread
from eval.methods import side_by_side, stages
from eval.methods.contest import parting
from eval.methods.floor import round_bytes
from eval.methods.peers import Peer
from eval.runs import provenance
from eval.runs.provenance import save
from frspec_jax.api import Generator, Request, Result
from frspec_jax.commands import results_console
from frspec_jax.errors import UserError
from pallas_kernels.timing import bandwidth

VOCABULARIES = "full,1/2,1/4,1/8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, VOCABULARIES)
    add_question_arguments(parser, questions=8, tokens=128)
    add_json_argument(parser)
    parser.add_argument("--shapes", type=moved, nargs="?", const="", help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=Path, metavar="PATH", help="the same model for transformers: HF folder or .gguf")


def moved(_: str) -> None:
    raise UserError("--shapes is a command of its own now; run: python -m eval stages MODEL")


def run(args: argparse.Namespace) -> None:
    request = decoding_request(args)
    checkpoint, methods = models(args)
    vanilla = methods["vanilla"]
    peer = Peer(args.peer, checkpoint.stop_ids, vanilla.dtype_name) if args.peer else None
    questions = spread(read_questions(args.data), args.questions)
    prompts = [vanilla.encode(question.first) for question in questions]
    figures = compare(methods, prompts, request, [question.task for question in questions], peer)
    show(figures)
    save(args.json, figures)


def compare(
    methods: dict[str, Generator],
    prompts: list[np.ndarray],
    request: Request,
    tasks: list[str],
    peer: Peer | None = None,
) -> dict[str, Any]:
    """Run the methods side by side; a list of figures by method, and the bandwidth they are held against.

    tasks: of each prompt, a name under which speed-ups are pooled.
    """
    results: dict[str, list[Result]] = {name: [] for name in methods}
    peer_rates = []
    console = Console(stderr=True)
    rounds = side_by_side.interleaved(methods, prompts, request)
    for prompt, answers in zip(track(prompts, "prompts", console=console), rounds, strict=True):
        for name, result in answers.items():
            results[name].append(result)
        if peer is not None:
            peer_rates.append(peer.decode_rate(prompt, request.max_new_tokens))
    side_by_side.check_rounds(sum(result.rounds for result in results["vanilla"]))
    speed = bandwidth()
    context = int(np.mean([len(p) for p in prompts])) + request.max_new_tokens // 2
    rows = [
        _row(name, methods[name], results)
        | {"by_task": by_task(results[name], results["vanilla"], tasks)}
        | _stages(methods[name], results[name], prompts, request, round_bytes(methods[name], context) / speed)
        for name in methods
    ]
    if peer_rates:
        rows.insert(0, {"name": "transformers", "tokens_per_second": round(statistics.median(peer_rates), 2)})
    trees = [m.tree for m in sorted(methods.values(), key=lambda m: m.drafting.pace is not None) if m.tree.size > 1]
    tree = trees[0]
    return {
        "tree": {"size": tree.size, "depth": tree.depth, "top_k": tree.top_k},
        "prompts": len(prompts),
        "max_new_tokens": request.max_new_tokens,
        "bandwidth_gb_per_second": round(speed / 1e9, 1),
        "methods": rows,
    }


def by_task(mine: list[Result], base: list[Result], tasks: list[str]) -> dict[str, float]:
    """How many times as fast as vanilla decoding the prompts of each task were, all of its time together."""

    def seconds(results: list[Result], task: str) -> float:
        return sum(result.decode_seconds for result, its in zip(results, tasks, strict=True) if its == task)

    return {task: round(seconds(base, task) / seconds(mine, task), 3) for task in dict.fromkeys(tasks)}


def _stages(
    model: Generator, mine: list[Result], prompts: list[np.ndarray], request: Request, floor: float
) -> dict[str, float]:
    """A round's stages, and its `floor` in seconds, where every round is the same."""
    if model.drafting.pace is not None:
        return {}
    times = [stages.stage_times(model, prompt, request) for prompt in prompts[:3]]
    return {
        "draft_ms": round(statistics.median(s.draft for s in times), 2),
        "verify_ms": round(statistics.median(s.verify for s in times), 2),
        "floor_ms": round(1e3 * floor, 2),
        "times_floor": round(_round_ms(mine) / (1e3 * floor), 2),
    }


def _round_ms(results: list[Result]) -> float:
    return statistics.median(1e3 * result.decode_seconds / max(1, result.rounds) for result in results)


def _row(name: str, model: Generator, results: dict[str, list[Result]]) -> dict[str, Any]:
    mine, base = results[name], results["vanilla"]
    tokens, rounds = sum(len(r.tokens) - 1 for r in mine), sum(r.rounds for r in mine)
    parted = [
        {"prompt": number, "token": parting(r.tokens, b.tokens), "prompt_tokens": r.prompt_tokens}
        for number, (r, b) in enumerate(zip(mine, base, strict=True))
        if r.tokens != b.tokens
    ]
    ratios = [r.decode_rate / b.decode_rate for r, b in zip(mine, base, strict=True) if b.decode_rate]
    return {
        "name": name,
        "draft_vocab": model.draft_vocab,
        "tokens_per_second": round(statistics.median(r.decode_rate for r in mine), 2),
        "speed_up": round(statistics.median(ratios), 3),
        "accepted_length": round(tokens / max(1, rounds), 3),
        "round_ms": round(_round_ms(mine), 2),
        "identical_to_vanilla": not parted,
        "parted": parted,
    }


HEADINGS = {
    "name": "method",
    "tokens_per_second": "tokens/s",
    "speed_up": "× vanilla",
    "accepted_length": "accepted",
    "draft_ms": "draft ms",
    "verify_ms": "verify ms",
    "times_floor": "× floor",
    "identical_to_vanilla": "identical",
}


def show(figures: dict[str, Any]) -> None:
    """The figures as a table."""
    tree = figures["tree"]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{provenance.machine()}; tree of {tree['size']}, depth {tree['depth']}, top-k {tree['top_k']}; "
        f"{figures['bandwidth_gb_per_second']} GB/s",
    )
    for heading in HEADINGS.values():
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in figures["methods"]:
        cells = {key: _cell(row.get(key)) for key in HEADINGS}
        if row.get("parted"):
            cells["identical_to_vanilla"] = f"{figures['prompts'] - len(row['parted'])} of {figures['prompts']}"
        table.add_row(*cells.values())
    results_console().print(table)
    tasks = list(figures["methods"][-1]["by_task"])
    if len(tasks) > 1:
        results_console().print(by_task_table(figures["methods"], tasks))
    print(
        "tokens/s: median over the prompts, decoding alone; accepted: tokens a round, the bonus token counted;\n"
        "× floor: a round against the time to read what it must; identical: to vanilla, on every prompt or so many"
    )


def by_task_table(rows: list[dict[str, Any]], tasks: list[str]) -> Table:
    """Speed-ups over vanilla, a column a task."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="× vanilla by task, all of its time together")
    for heading in ("method", *tasks, "mean"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        if row["name"] not in ("vanilla", "transformers"):
            speed_ups = [row["by_task"][task] for task in tasks]
            cells = [f"{value:.2f}" for value in (*speed_ups, statistics.mean(speed_ups))]
            table.add_row(row["name"], *cells)
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
