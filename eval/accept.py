"""`python -m eval accept --ckpt CKPT --data FILE`: accepted length over a question set, by task and V'.

Greedy; accepted drafts and the bonus token, pooled over all rounds of a task. The second turn of a
conversation sees the first answer.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from eval import measure
from eval.figures import acceptance_by_depth
from eval.options import (
    add_json_argument,
    add_model_arguments,
    add_question_arguments,
    add_ranking_argument,
    models,
    save,
)
from eval.questions import Question, of_tasks, read_questions, spread
from frspec_jax.api import Generator, Request, Result
from frspec_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "full,1/4")
    add_question_arguments(parser, questions=None, tokens=512)
    add_ranking_argument(parser)
    add_json_argument(parser)
    parser.add_argument("--tasks", metavar="TASK,...", help="MT, Conv, RAG, Math, QA, Summ, Code (default: all)")


def run(args: argparse.Namespace) -> None:
    questions = spread(of_tasks(read_questions(args.data), args.tasks), args.questions)
    _, found = models(args, args.ranking)
    del found["vanilla"]
    request = Request(args.max_new_tokens)
    by_method: dict[str, dict[str, list[Result]]] = {name: {} for name in found}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("questions", total=len(questions) * len(found))
        for question in questions:
            for name, model in found.items():
                by_method[name].setdefault(question.task, []).extend(answer(model, question, request))
                progress.advance(task)
    figures = {
        "tree": dataclasses.asdict(next(iter(found.values())).tree),
        "max_new_tokens": args.max_new_tokens,
        "questions": len(questions),
        "methods": [
            {"name": name, **summary(by_method[name]), "coverage": coverage(model, by_method[name])}
            for name, model in found.items()
        ],
    }
    show(figures)
    save(args.json, figures)


def answer(model: Generator, question: Question, request: Request) -> list[Result]:
    """Answer a question's turns, each one seeing those before it; a turn that no longer fits is left out."""
    messages: list[dict[str, str]] = []
    results: list[Result] = []
    for turn in question.turns:
        messages.append({"role": "user", "content": turn})
        try:
            result = model.generate(messages, request)
        except UserError:
            if not results:
                raise
            break
        messages.append({"role": "assistant", "content": result.text})
        results.append(result)
    return results


def summary(by_task: dict[str, list[Result]]) -> dict[str, Any]:
    """Accepted length by task and on average, rounds by emitted tokens, and acceptance by depth."""
    lengths: dict[str, float] = {}
    histogram = np.zeros(1, np.int64)
    for task, results in by_task.items():
        counts = np.sum([r.accepted_histogram for r in results], axis=0)
        lengths[task] = round(float(counts @ np.arange(1, len(counts) + 1) / max(1, counts.sum())), 3)
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
    return round(float(np.isin(tokens, measure.draft_ids(model)).mean()), 4)


def show(figures: dict[str, Any]) -> None:
    """Tasks as columns, as in the paper's Table 1."""
    methods = figures["methods"]
    tasks = list(methods[0]["accepted_length"])
    table = Table(title=f"accepted length (bonus token counted), greedy, {figures['questions']} questions")
    for heading in ("method", *tasks, "average", "of the first", "coverage"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in methods:
        share = row["average"] / methods[0]["average"]
        lengths = (f"{row['accepted_length'][task]:.2f}" for task in tasks)
        table.add_row(row["name"], *lengths, f"{row['average']:.2f}", f"{share:.1%}", f"{row['coverage']:.1%}")
    Console().print(table)
