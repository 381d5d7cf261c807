"""`python -m eval run --ckpt CKPT --out RUN [--data DIR]`: answer question sets with every method, and keep records.

Vanilla, EAGLE-2, FR-Spec at each V' and, with --peer, transformers answer each question in turn, on
the same prompts: the second turn of a conversation sees vanilla's first answer, which is every
method's own wherever outputs are identical. One line a question goes into RUN; the same command
goes on where an interrupted one stopped. `python -m eval report RUN` makes tables and plots of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eval.commands.flags import add_model_arguments, add_question_arguments, add_ranking_argument, models, progress_bar
from eval.data.questions import Question, alternated, by_task, digest, of_tasks, read_questions, spread
from eval.methods import peers
from eval.methods.contest import Contest, first_prompt
from eval.runs import manifest, output, records
from frspec_jax.api import Generator, Request
from frspec_jax.config import Sampling
from frspec_jax.entry import spelled
from frspec_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "full,1/2,1/4,1/8,1/16")
    add_ranking_argument(parser)
    add_question_arguments(parser, questions=None, tokens=512)
    parser.add_argument(
        "--out", type=output.folder_of("--out"), required=True, metavar="RUN", help="folder of the records; resumes"
    )
    parser.add_argument("--tasks", metavar="TASK,...", help="MT, Conv, RAG, Math, QA, Summ, Code (default: all)")
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="answer every question N times (default: 1)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest share P (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer (default: at most 4096)")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="the same model for transformers: HF folder or .gguf")


def run(args: argparse.Namespace) -> None:
    # Everything that can be refused without a model is refused before one is loaded.
    request = Request(args.max_new_tokens, Sampling(args.temperature, args.top_k, args.top_p), args.seed)
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats} must be at least 1")
    if args.peer and not request.sampling.greedy:
        raise UserError(f"--peer answers greedily, so --temperature {args.temperature} cannot be compared; drop one")
    if args.peer:
        peers.check(args.peer)
    questions = alternated(spread(of_tasks(read_questions(args.data), args.tasks), args.questions))
    checkpoint, methods = models(args, args.ranking, args.context)
    asked = [question for question in questions if fits(methods, question, request)]
    if not asked:
        raise UserError("no question fits --context; raise it")
    configuration = {
        "kind": "run",
        **manifest.of_models(checkpoint, methods, args.ranking),
        "--max-new-tokens": request.max_new_tokens,
        "--temperature": request.sampling.temperature,
        "--top-k": request.sampling.top_k,
        "--top-p": request.sampling.top_p,
        "--seed": request.seed,
        "--repeats": args.repeats,
        "--context": methods["vanilla"].runtime.context,
        "--peer": args.peer.name if args.peer else None,
        "questions": {
            "asked": len(asked),
            "too long": len(questions) - len(asked),
            "tasks": {task: len(group) for task, group in by_task(asked).items()},
            "digest": digest(asked),
        },
    }
    with records.opened(args.out, configuration) as kept:
        fill(kept, asked, args.repeats, methods, args.peer, request)
    print(spelled(f"{len(kept.lines)} answered questions in {args.out}; next: python -m eval report {args.out}"))


def fill(
    kept: records.Records,
    questions: list[Question],
    repeats: int,
    methods: dict[str, Generator],
    rival: Path | None,
    request: Request,
) -> None:
    """Ask what the records do not hold yet."""
    done = {(record["question"], record["repeat"]) for record in kept.lines}
    plan = [(question, repeat) for repeat in range(repeats) for question in questions]
    waiting = [(turn, *item) for turn, item in enumerate(plan) if (item[0].key, item[1]) not in done]
    if not waiting:
        return
    with progress_bar() as progress:
        bar = progress.add_task("warming up", total=len(plan), completed=len(done))
        vanilla = methods["vanilla"]
        other = None if rival is None else peers.Peer(rival, vanilla.checkpoint.stop_ids, vanilla.dtype_name)
        contest = Contest(methods, other, request)
        contest.warm_up(questions[0])
        for turn, question, repeat in waiting:
            progress.update(bar, description=question.key)
            turns = contest.ask(question, turn)
            own = {} if question.id is None else {"id": question.id}
            record = {"question": question.key, **own, "task": question.task, "repeat": repeat, "turns": turns}
            kept.append(record)
            progress.advance(bar)


def fits(methods: dict[str, Generator], question: Question, request: Request) -> bool:
    """Whether every method's context has room for a question's first turn."""
    prompt = first_prompt(methods["vanilla"], question)
    try:
        return all(model.check(prompt, request) > 0 for model in methods.values())
    except UserError:
        return False
