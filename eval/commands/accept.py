"""`python -m eval accept --ckpt CKPT --data FILE`: accepted length over a question set, by task and V'.

Greedy; accepted drafts and the bonus token, pooled over all rounds of a task. The second turn of a
conversation sees the first method's answer, which is every method's but for near-ties. With --replay vanilla alone
decodes, and each method is held against its answers: the same lengths, sooner.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from eval.commands.flags import (
    add_json_argument,
    add_model_arguments,
    add_out_argument,
    add_question_arguments,
    add_ranking_argument,
    decoding_request,
    models,
    progress_bar,
)
from eval.data.questions import Question, of_tasks, read_questions, spread
from eval.methods import replay, side_by_side
from eval.runs.provenance import machine, save
from eval.show import plots
from eval.show.head_plots import kept_by_rows
from eval.show.tallies import acceptance_by_depth
from frspec_jax.api import Generator, Reading, Request, Result
from frspec_jax.commands import results_console
from frspec_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "full,1/4")
    add_question_arguments(parser, questions=None, tokens=512)
    add_ranking_argument(parser)
    add_json_argument(parser)
    add_out_argument(parser, "a plot of accepted length by rows of the draft's head goes there")
    parser.add_argument(
        "--replay",
        action="store_true",
        help="decode each answer once, with vanilla, and hold every method against it: the same lengths, sooner",
    )
    parser.add_argument("--tasks", metavar="TASK,...", help="MT, Conv, RAG, Math, QA, Summ, Code (default: all)")


def run(args: argparse.Namespace) -> None:
    request = decoding_request(args)
    if args.replay and args.pace != "fixed":
        raise UserError(f"--replay grows the same tree in every round, and --pace {args.pace} does not; drop one")
    questions = spread(of_tasks(read_questions(args.data), args.tasks), args.questions)
    _, methods = models(args, args.ranking)
    vanilla = methods.pop("vanilla")
    by_method: ByMethod = {name: {} for name in methods}
    gather = replayed if args.replay else decoded
    gather(vanilla, methods, questions, request, by_method)
    side_by_side.check_rounds(
        min(sum(one.result.rounds for given in tasks.values() for one in given) for tasks in by_method.values())
    )
    figures = {
        "model": vanilla.checkpoint.path.resolve().name,
        "tree": dataclasses.asdict(next(iter(methods.values())).tree),
        "max_new_tokens": args.max_new_tokens,
        "questions": len(questions),
        "vocabulary": vanilla.checkpoint.config.vocab_size,
        "methods": [{"name": name, **rows_of(model), **summary(by_method[name])} for name, model in methods.items()],
    }
    show(figures)
    if args.out is not None:
        plots.save(kept_by_rows(figures, machine()), args.out, "accepted_by_rows")
    save(args.json, figures)


def rows_of(model: Generator) -> dict[str, int]:
    """How many rows the draft's head reads: V', and slots for ids of the text."""
    assert model.draft_vocab is not None
    return {"draft_vocab": model.draft_vocab, "context_slots": model.context_slots}


@dataclasses.dataclass(frozen=True)
class Answer:
    """A method's answer, and how many of its tokens V' or a slot held: what the best of drafts could reach."""

    result: Result
    covered: int


ByMethod = dict[str, dict[str, list[Answer]]]  # the answers of each method, by task


def decoded(
    vanilla: Generator, methods: dict[str, Generator], questions: list[Question], request: Request, into: ByMethod
) -> None:
    """Every method's answers to all questions, as it decodes; a later turn sees the first method's."""
    with progress_bar() as progress:
        for question in progress.track(questions, description="questions"):
            for prompt, results in answers(methods, question, request):
                note(methods, question.task, prompt, results, into)


def replayed(
    vanilla: Generator, methods: dict[str, Generator], questions: list[Question], request: Request, into: ByMethod
) -> None:
    """The same out of vanilla's answers; a later turn sees those."""
    tasks, given = [], []
    with progress_bar() as progress:
        for question in progress.track(questions, description="questions"):
            for prompt, results in answers({"vanilla": vanilla, **methods}, question, request, ["vanilla"]):
                tasks.append(question.task)
                given.append(replay.Answered(prompt, results["vanilla"]))
        place = 0
        bar = progress.add_task("answers replayed", total=len(given))
        for found in replay.replayed(methods, given):
            for each in zip(*found.values(), strict=True):
                note(methods, tasks[place], given[place].prompt, dict(zip(found, each, strict=True)), into)
                place += 1
            progress.update(bar, completed=place)


def note(
    methods: dict[str, Generator], task: str, prompt: np.ndarray, results: dict[str, Result], into: ByMethod
) -> None:
    """Write down each method's answer to a prompt of ids [T]."""
    for name, result in results.items():
        covered = side_by_side.covered(methods[name], prompt, result.tokens)
        into[name].setdefault(task, []).append(Answer(result, covered))


def answers(
    models: dict[str, Generator], question: Question, request: Request, names: Sequence[str] = ()
) -> Iterator[tuple[np.ndarray, dict[str, Result]]]:
    """The prompts of a question's turns, and the answers of those called `names` (none: of all).

    A turn that no longer fits one of the models is left out.
    """
    first, names = next(iter(models.values())), names or list(models)
    messages = question.opening
    for turn in question.turns:
        messages.append({"role": "user", "content": turn})
        prompt = first.encode(messages)
        try:
            for model in models.values():
                model.check(prompt, request)
        except UserError:
            if messages == question.first:
                raise
            break
        readings: dict[Hashable, Reading] = {}
        results = {name: side_by_side.answer(models[name], prompt, request, readings) for name in names}
        yield prompt, results
        messages.append({"role": "assistant", "content": results[names[0]].text})


def summary(by_task: dict[str, list[Answer]]) -> dict[str, Any]:
    """Accepted length by task and on average, rounds by emitted tokens, acceptance by depth, and coverage.

    A task whose answers are all one token long took no round, and has no length.
    """
    lengths: dict[str, float] = {}
    histogram = np.zeros(1, np.int64)
    for task, given in by_task.items():
        counts = np.sum([one.result.accepted_histogram for one in given], axis=0)
        if counts.sum():
            lengths[task] = round(float(counts @ np.arange(1, len(counts) + 1) / counts.sum()), 3)
        histogram = counts + histogram
    every = [one for given in by_task.values() for one in given]
    return {
        "accepted_length": lengths,
        "average": round(float(np.mean(list(lengths.values()))), 3),
        "histogram": histogram.tolist(),
        "acceptance_by_depth": np.round(acceptance_by_depth(histogram), 3).tolist(),
        "coverage": round(sum(one.covered for one in every) / sum(len(one.result.tokens) for one in every), 4),
    }


def show(figures: dict[str, Any]) -> None:
    """Tasks as columns, as in the paper's Table 1."""
    methods = figures["methods"]
    tasks = list(methods[0]["accepted_length"])
    table = Table(title=f"accepted length (bonus token counted), greedy, {figures['questions']} questions")
    for heading in ("method", "rows", *tasks, "average", "of the first", "coverage"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in methods:
        share, rows = row["average"] / methods[0]["average"], row["draft_vocab"] + row["context_slots"]
        lengths = (f"{row['accepted_length'].get(task, 0):.2f}" for task in tasks)
        table.add_row(
            row["name"], f"{rows:,}", *lengths, f"{row['average']:.2f}", f"{share:.1%}", f"{row['coverage']:.1%}"
        )
    results_console().print(table)
