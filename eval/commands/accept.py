"""`python -m eval accept --ckpt CKPT --data FILE`: accepted length over a question set, by task and V'.

Greedy; accepted drafts and the bonus token, pooled over all rounds of a task. The second turn of a
conversation sees the first method's answer, which is every method's but for near-ties.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np
from rich.table import Table

from eval.commands.flags import (
    add_json_argument,
    add_model_arguments,
    add_question_arguments,
    add_ranking_argument,
    decoding_request,
    models,
    progress_bar,
)
from eval.data.questions import Question, of_tasks, read_questions, spread
from eval.methods import side_by_side
from eval.runs.provenance import save
from eval.show.tallies import acceptance_by_depth
from frspec_jax.api import Generator, Reading, Request, Result
from frspec_jax.commands import results_console
from frspec_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "full,1/4")
    add_question_arguments(parser, questions=None, tokens=512)
    add_ranking_argument(parser)
    add_json_argument(parser)
    parser.add_argument("--tasks", metavar="TASK,...", help="MT, Conv, RAG, Math, QA, Summ, Code (default: all)")


def run(args: argparse.Namespace) -> None:
    request = decoding_request(args)
    questions = spread(of_tasks(read_questions(args.data), args.tasks), args.questions)
    _, methods = models(args, args.ranking)
    del methods["vanilla"]
    by_method: dict[str, dict[str, list[Result]]] = {name: {} for name in methods}
    with progress_bar() as progress:
        for question in progress.track(questions, description="questions"):
            for name, results in answers(methods, question, request).items():
                by_method[name].setdefault(question.task, []).extend(results)
    side_by_side.check_rounds(
        min(sum(result.rounds for results in tasks.values() for result in results) for tasks in by_method.values())
    )
    figures = {
        "tree": dataclasses.asdict(next(iter(methods.values())).tree),
        "max_new_tokens": args.max_new_tokens,
        "questions": len(questions),
        "methods": [
            {"name": name, **summary(by_method[name]), "coverage": coverage(model, by_method[name])}
            for name, model in methods.items()
        ],
    }
    show(figures)
    save(args.json, figures)


def answers(models: dict[str, Generator], question: Question, request: Request) -> dict[str, list[Result]]:
    """Each method's answers to a question's turns; a turn that no longer fits is left out."""
    first = next(iter(models.values()))
    messages: list[dict[str, str]] = []
    given: dict[str, list[Result]] = {name: [] for name in models}
    for turn in question.turns:
        messages.append({"role": "user", "content": turn})
        prompt = first.encode(messages)
        try:
            for model in models.values():
                model.check(prompt, request)
        except UserError:
            if len(messages) == 1:
                raise
            break
        readings: dict[Hashable, Reading] = {}
        for name, model in models.items():
            given[name].append(side_by_side.answer(model, prompt, request, readings))
        messages.append({"role": "assistant", "content": next(iter(given.values()))[-1].text})
    return given


def summary(by_task: dict[str, list[Result]]) -> dict[str, Any]:
    """Accepted length by task and on average, rounds by emitted tokens, and acceptance by depth.

    A task whose answers are all one token long took no round, and has no length.
    """
    lengths: dict[str, float] = {}
    histogram = np.zeros(1, np.int64)
    for task, results in by_task.items():
        counts = np.sum([r.accepted_histogram for r in results], axis=0)
        if counts.sum():
            lengths[task] = round(float(counts @ np.arange(1, len(counts) + 1) / counts.sum()), 3)
        histogram = counts + histogram
    return {
        "accepted_length": lengths,
        "average": round(float(np.mean(list(lengths.values()))), 3),
        "histogram": histogram.tolist(),
        "acceptance_by_depth": np.round(acceptance_by_depth(histogram), 3).tolist(),
    }


def coverage(model: Generator, by_task: dict[str, list[Result]]) -> float:
    """The share of the answers' tokens that is inside V': what the best of drafts could reach."""
    tokens = np.concatenate([result.tokens for results in by_task.values() for result in results])
    return round(float(np.isin(tokens, side_by_side.draft_ids(model)).mean()), 4)


def show(figures: dict[str, Any]) -> None:
    """Tasks as columns, as in the paper's Table 1."""
    methods = figures["methods"]
    tasks = list(methods[0]["accepted_length"])
    table = Table(title=f"accepted length (bonus token counted), greedy, {figures['questions']} questions")
    for heading in ("method", *tasks, "average", "of the first", "coverage"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in methods:
        share = row["average"] / methods[0]["average"]
        lengths = (f"{row['accepted_length'].get(task, 0):.2f}" for task in tasks)
        table.add_row(row["name"], *lengths, f"{row['average']:.2f}", f"{share:.1%}", f"{row['coverage']:.1%}")
    results_console().print(table)
