"""`python -m eval simulate --ckpt CKPT --data FILE`: ways of pacing rounds, simulated and measured side by side.

Vanilla answers each question; each way of pacing is then led over that text, at the costs that were measured on this
device (`frspec_jax.pace_tables`). The same ways, but for perfect hindsight, decode the same questions in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from eval.commands.flags import add_json_argument, add_question_arguments, decoding_request, progress_bar
from eval.data.questions import read_questions, spread
from eval.methods import side_by_side
from eval.methods.simulate import Policy, Simulated, policies, simulated
from eval.runs.provenance import machine, save
from frspec_jax import api, compile_cache
from frspec_jax.api import NO_DRAFT, Draft, Generator, Result
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.commands import results_console
from frspec_jax.config import TreeConfig
from frspec_jax.errors import UserError
from frspec_jax.flags import add_dtype_flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--draft", metavar="NAME", help="a draft's name or folder (default: the first that the checkpoint had)"
    )
    parser.add_argument("--draft-vocab", metavar="N", help="V', a number, full or a share (default: as users get it)")
    add_dtype_flag(parser)
    add_question_arguments(parser, questions=12, tokens=96)
    parser.add_argument("--no-decoding", action="store_true", help="simulate alone, and measure nothing")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    request = decoding_request(args)
    questions = spread(read_questions(args.data), args.questions)
    compile_cache.enable()
    checkpoint = Checkpoint.open(args.ckpt)
    vanilla = api.load(checkpoint, NO_DRAFT, dtype=args.dtype)
    draft = Draft(args.draft, args.draft_vocab, pace="auto")
    model = loaded(vanilla, draft)
    pace = model.drafting.pace
    if pace is None or not model.drafting.drafter.by_level(pace.growth):
        raise UserError(f"{args.ckpt} holds no draft to pace; add one with python -m train eagle or convert eagle")
    model.warm_up()
    ways = policies(pace.sizes, pace.growth.depth)
    methods = {} if args.no_decoding else decoders(vanilla, model, draft, ways)
    tasks = [question.task for question in questions]
    sums: dict[str, dict[str, Simulated]] = {way.name: {} for way in ways}
    timed: dict[str, list[Result]] = {name: [] for name in methods}
    with progress_bar() as progress:
        for index, question in enumerate(progress.track(questions, description="questions")):
            prompt = vanilla.encode(question.first)
            answer = vanilla.generate_ids(prompt, request)
            for way in ways:
                one = simulated(model, [*prompt.tolist(), *answer.tokens], len(prompt), way)
                sums[way.name][question.task] = sums[way.name].get(question.task, Simulated(0, 0, 0.0)) + one
            for name in side_by_side.in_turn(list(methods), index) if methods else ():
                timed[name].append(methods[name].generate_ids(prompt, request))
    side_by_side.check_rounds(sum(one.rounds for one in sums["vanilla"].values()))
    assert model.weights.pace is not None
    costs = {key: np.asarray(ms).round(2).tolist() for key, ms in vars(model.weights.pace.costs).items()}
    figures = {
        "machine": machine(),
        "method": side_by_side.label(model),
        "questions": len(questions),
        "max_new_tokens": request.max_new_tokens,
        "costs_ms": {"nodes": pace.sizes, **costs},
        "ways": [row(way, sums, timed, tasks) for way in ways],
    }
    show(figures)
    save(args.json, figures)


def loaded(vanilla: Generator, draft: Draft) -> Generator:
    """A draft on the same target."""
    options = {"dtype": vanilla.runtime.dtype, "target": vanilla.weights.target}
    return api.load(vanilla.checkpoint, draft, **options)


def decoders(vanilla: Generator, model: Generator, draft: Draft, ways: list[Policy]) -> dict[str, Generator]:
    """What decodes as each policy does, by its name; nothing does with hindsight."""
    pace = model.drafting.pace
    assert pace is not None and ways[1].always is not None
    size, levels = ways[1].always
    tree = TreeConfig(pace.sizes[size], levels, min(pace.growth.top_k, pace.sizes[size] - 1))
    fixed = dataclasses.replace(draft, tree=tree, pace="fixed", context_slots=model.context_slots)
    found = {
        ways[0].name: vanilla,
        ways[1].name: loaded(vanilla, fixed),
        ways[2].name: loaded(vanilla, dataclasses.replace(draft, copying=False)),
        ways[3].name: model,
    }
    for one in found.values():
        one.warm_up()
    return found


def row(
    way: Policy, sums: dict[str, dict[str, Simulated]], timed: dict[str, list[Result]], tasks: list[str]
) -> dict[str, Any]:
    """A policy's figures: how many times as fast as vanilla it is, by task and on average."""
    mine, base = sums[way.name], sums["vanilla"]
    by_task = {task: rate(mine[task]) / rate(base[task]) for task in mine if base[task].milliseconds}
    whole = sum(mine.values(), Simulated(0, 0, 0.0))
    found: dict[str, Any] = {
        "name": way.name,
        "tokens_a_round": round(whole.tokens / max(1, whole.rounds), 3),
        "simulated": {task: round(times, 3) for task, times in by_task.items()},
        "simulated_mean": round(statistics.mean(by_task.values()), 3),
    }
    if way.name in timed:
        seconds = {
            name: {
                task: sum(result.decode_seconds for result, its in zip(timed[name], tasks, strict=True) if its == task)
                for task in by_task
            }
            for name in ("vanilla", way.name)
        }
        measured = {task: seconds["vanilla"][task] / seconds[way.name][task] for task in by_task}
        tokens = sum(len(result.tokens) - 1 for result in timed[way.name])
        found |= {
            "measured": {task: round(times, 3) for task, times in measured.items()},
            "measured_mean": round(statistics.mean(measured.values()), 3),
            "measured_tokens_a_round": round(tokens / max(1, sum(result.rounds for result in timed[way.name])), 3),
        }
    return found


def rate(one: Simulated) -> float:
    """Tokens a millisecond."""
    return one.tokens / one.milliseconds if one.milliseconds else 0.0


def show(figures: dict[str, Any]) -> None:
    """Ways of pacing by what they bring over vanilla, simulated beside measured."""
    title = f"{figures['machine']}: {figures['method']}, {figures['questions']} questions; times as fast as vanilla"
    tasks = list(figures["ways"][0]["simulated"])
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    headings = ("pace", "tokens a round", *tasks, "simulated", "measured", "its tokens a round")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "pace" else "right", no_wrap=True)
    for way in figures["ways"]:
        simulated_by_task = (f"{way['simulated'][task]:.2f}" for task in tasks)
        measured = (f"{way[key]:.2f}" if key in way else "" for key in ("measured_mean", "measured_tokens_a_round"))
        table.add_row(
            way["name"], f"{way['tokens_a_round']:.2f}", *simulated_by_task, f"{way['simulated_mean']:.2f}", *measured
        )
    results_console().print(table)
    print("by task and simulated: by the table of measured costs; measured: all decoding time of a task together")
