"""`python -m eval loops --ckpt CKPT`: the same rounds, driven by the host or compiled into one loop.

The paper's Figure 5, with three ways to drive:
compiled loop     all rounds in one program, as generate runs them
a call a round    the host starts each round and reads whether it was the last, as stream does
a call a stage    the host starts draft, verify and accept apart, as an engine written op by op must
The tokens are the same; only the host's share of the time differs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from eval.commands.flags import (
    add_json_argument,
    add_model_arguments,
    add_out_argument,
    add_question_arguments,
    decoding_request,
    models,
)
from eval.data.questions import read_questions, spread
from eval.methods import side_by_side, stages
from eval.runs import provenance
from eval.runs.provenance import save
from eval.show import plots
from frspec_jax import engine
from frspec_jax.api import Generator, Request, Text
from frspec_jax.commands import results_console
from frspec_jax.plan import Plan
from frspec_jax.state import RUNNING, DecodeState, Weights


def compiled_loop(text: Text) -> None:
    """All rounds in one program."""
    text.advance()


def call_a_round(text: Text) -> None:
    """One program a round; the host reads after each whether to go on."""

    def rounds(plan: Plan, weights: Weights, state: DecodeState) -> DecodeState:
        while int(state.finished) == RUNNING:
            state = engine.run(plan, weights, state, np.int32(1))
        return state

    text.drive(rounds)


def call_a_stage(text: Text) -> None:
    """Three programs a round; the host reads after each round whether to go on."""

    def rounds(plan: Plan, weights: Weights, state: DecodeState) -> DecodeState:
        while int(state.finished) == RUNNING:
            tree, state = stages.draft_step(plan, weights, state)
            verdict, state = stages.verify_step(plan, weights, state, tree)
            state = stages.accept_step(plan, state, tree, verdict)
        return state

    text.drive(rounds)


DRIVES: dict[str, Callable[[Text], None]] = {
    "compiled loop": compiled_loop,
    "a call a round": call_a_round,
    "a call a stage": call_a_stage,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "full,1/4")
    add_question_arguments(parser, questions=4, tokens=64)
    add_out_argument(parser, "where the plot goes", required=True)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    request = decoding_request(args)
    checkpoint, methods = models(args)
    texts = [question.first for question in spread(read_questions(args.data), args.questions)]
    prompts = [methods["vanilla"].encode(text) for text in texts]
    rows = compare(methods, prompts, request)
    title = plots.heading(checkpoint.path.resolve().name, provenance.machine())
    plots.save(drawing(rows, title), args.out, "loops")
    save(args.json, {"prompts": len(prompts), "max_new_tokens": args.max_new_tokens, "methods": rows})
    show(rows)


def compare(methods: dict[str, Generator], prompts: list[np.ndarray], request: Request) -> list[dict[str, Any]]:
    """Milliseconds a round by method and drive: medians over the prompts, drives interleaved.

    Raises:
      UserError: no prompt's answer takes a round.
    """
    times: dict[str, dict[str, list[float]]] = {name: {drive: [] for drive in DRIVES} for name in methods}
    for model in methods.values():
        for drive in DRIVES:
            timed(model, drive, prompts[0], request)  # compiles
    for turn, prompt in enumerate(track(prompts, "prompts", console=Console(stderr=True))):
        for name, model in methods.items():
            outputs = set()
            for drive in side_by_side.in_turn(list(DRIVES), turn):
                tokens, rounds, seconds = timed(model, drive, prompt, request)
                outputs.add(tuple(tokens))
                if rounds:
                    times[name][drive].append(1e3 * seconds / rounds)
            if len(outputs) > 1:
                raise RuntimeError(f"{name}: the drives emitted different tokens")
    side_by_side.check_rounds(min(len(measured) for drives in times.values() for measured in drives.values()))
    return [
        {"name": name, "round_ms": {drive: round(statistics.median(ms), 3) for drive, ms in drives.items()}}
        for name, drives in times.items()
    ]


def timed(model: Generator, drive: str, prompt: np.ndarray, request: Request) -> tuple[list[int], int, float]:
    """One answer under a drive: its tokens, its rounds, and the seconds of decoding."""
    with model.begin(prompt, request) as text:
        DRIVES[drive](text)
        result = text.result()
    return result.tokens, result.rounds, result.decode_seconds


def drawing(rows: list[dict[str, Any]], title: str) -> Figure:
    """Grouped bars: milliseconds a round, by method and drive."""
    drawn, (axis,) = plots.figure(width=8)
    width = 0.8 / len(DRIVES)
    for number, drive in enumerate(DRIVES):
        places = np.arange(len(rows)) + (number - (len(DRIVES) - 1) / 2) * width
        values = [row["round_ms"][drive] for row in rows]
        bars = axis.bar(places, values, 0.92 * width, color=plots.COLOURS[number], label=drive)
        axis.bar_label(bars, fmt="%.3g", fontsize="x-small")
    axis.set_xticks(range(len(rows)), [plots.plain(row["name"]) for row in rows])
    axis.set_ylabel("milliseconds a round")
    axis.set_title(title, fontsize="medium", loc="left")
    axis.legend(fontsize="small")
    return drawn


def show(rows: list[dict[str, Any]]) -> None:
    """Milliseconds a round as a table, and how much the compiled loop saves."""
    table = Table(title=f"{provenance.machine()}: milliseconds a round")
    for heading in ("method", *DRIVES, "saved"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        times = row["round_ms"]
        saved = 1 - times["compiled loop"] / times["a call a stage"]
        table.add_row(row["name"], *(f"{times[drive]:.2f}" for drive in DRIVES), f"{saved:.1%}")
    results_console().print(table)
    print("saved: by the compiled loop, of the time with a call a stage")
