"""`python -m eval quality --ckpt CKPT --data DATA --out RUN`: does drafting change what the answers are worth?

HumanEval's pass@1 and GSM8K's accuracy, for vanilla decoding and FR-Spec (the paper's Table 4): greedy
once, and sampled with several seeds. Answers are kept as they come, and the same command goes on where
an interrupted one stopped. Code that the model has written runs only with --execute, in a process with
limits on time, memory and files and without network; without it HumanEval's answers are kept, not judged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from eval.commands.flags import add_model_arguments, models, progress_bar
from eval.data.problems import BENCHMARKS, Problem, read_problems
from eval.data.questions import alternated, spread
from eval.methods import peers
from eval.runs import manifest, output, records
from eval.sandbox import judge
from eval.show import tables
from frspec_jax import files
from frspec_jax.api import Generator, Request
from frspec_jax.config import Sampling
from frspec_jax.errors import UserError

PEER = "transformers"
NOT_JUDGED = "not judged: --execute runs model-written code"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "1/4")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with humaneval/HumanEval.jsonl.gz and gsm8k/test.jsonl, or one of them",
    )
    parser.add_argument(
        "--out", type=output.folder_of("--out"), required=True, metavar="RUN", help="folder of the answers; resumes"
    )
    parser.add_argument("--questions", type=int, metavar="N", help="evenly over the benchmarks (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    parser.add_argument("--temperature", default="0,1", metavar="T,T,...", help="0 is greedy (default: 0,1)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="answers above temperature 0 (default: 5)")
    parser.add_argument(
        "--peer", type=Path, metavar="PATH", help="the same model for transformers, greedy: HF folder or .gguf"
    )
    parser.add_argument("--execute", action="store_true", help="run the code that the model has written, shut in")


def run(args: argparse.Namespace) -> None:
    temperatures = temperatures_of(args.temperature)
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds} must be at least 1")
    if args.peer:
        peers.check(args.peer)
    request = Request(args.max_new_tokens)
    chosen = alternated(spread(read_problems(args.data), args.questions))
    problems = {problem.key: problem for problem in chosen}
    if args.execute:
        judge.check()
    checkpoint, methods = models(args)
    text = json.dumps([[problem.key, problem.prompt] for problem in problems.values()])
    configuration = {
        "kind": "quality",
        **manifest.of_models(checkpoint, methods),
        "--max-new-tokens": request.max_new_tokens,
        "--temperature": args.temperature,
        "--seeds": args.seeds,
        "--peer": args.peer.name if args.peer else None,
        "problems": {"asked": len(problems), "digest": hashlib.sha256(text.encode()).hexdigest()[:16]},
    }
    with records.opened(args.out, configuration) as kept:
        fill(kept, list(problems.values()), methods, args.peer, request, temperatures, args.seeds)
        scores = judged(kept.lines, problems, args.execute)
    table = table_4(scores, args.seeds)
    files.write_text(args.out / "quality.md", table.markdown(), f"--out {args.out / 'quality.md'}")
    files.write_text(args.out / "quality.csv", table.csv(), f"--out {args.out / 'quality.csv'}")
    print(table.markdown())
    if not args.execute and any(problem.task == "HumanEval" for problem in problems.values()):
        print("HumanEval's answers are kept and were not run. With --execute the same command judges them.")


def temperatures_of(text: str) -> list[float]:
    """What --temperature lists, each once."""
    try:
        temperatures = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--temperature {text}: give numbers with commas between them") from None
    for temperature in temperatures:
        Sampling(temperature)
    return list(dict.fromkeys(temperatures))


def fill(
    kept: records.Records,
    problems: list[Problem],
    methods: dict[str, Generator],
    model: Path | None,
    request: Request,
    temperatures: list[float],
    seeds: int,
) -> None:
    """Ask what the records do not hold yet: every problem at every temperature, greedy once, else for every seed."""
    done = {(record["question"], record["repeat"]) for record in kept.lines}
    plan = [
        (problem, temperature, seed)
        for temperature in temperatures
        for seed in range(seeds if temperature else 1)
        for problem in problems
    ]
    waiting = [item for item in plan if (f"{item[0].key} T={item[1]:g}", item[2]) not in done]
    if not waiting:
        return
    vanilla = methods["vanilla"]
    rival = peers.Peer(model, vanilla.checkpoint.stop_ids, vanilla.dtype_name) if model else None
    with progress_bar() as progress:
        bar = progress.add_task("", total=len(plan), completed=len(done))
        for problem, temperature, seed in waiting:
            progress.update(bar, description=problem.key)
            asked = Request(request.max_new_tokens, Sampling(temperature), seed)
            answers = {name: one.generate(problem.prompt, asked).text for name, one in methods.items()}
            if rival is not None and temperature == 0:
                tokens = rival.answer(vanilla.encode(problem.prompt), request.max_new_tokens).tokens
                answers[PEER] = methods["vanilla"].checkpoint.tokenizer.decode(tokens, skip_special_tokens=True)
            kept.append(
                {
                    "question": f"{problem.key} T={temperature:g}",
                    "repeat": seed,
                    "problem": problem.key,
                    "temperature": temperature,
                    "answers": answers,
                }
            )
            progress.advance(bar)


Scores = dict[tuple[str, float], dict[str, dict[int, list[bool]]]]  # (benchmark, temperature), method, seed


def judged(lines: list[dict[str, Any]], problems: Mapping[str, Problem], execute: bool) -> Scores:
    """Which answers are right; without `execute` those to HumanEval are left out. Equal answers are run once."""
    scores: Scores = {}
    for line in track(lines, "judging", console=Console(stderr=True), disable=not execute):
        problem = problems[line["problem"]]
        methods = scores.setdefault((problem.task, line["temperature"]), {})
        verdicts: dict[str, bool] = {}
        for name, text in line["answers"].items():
            by_seed = methods.setdefault(name, {})
            if problem.task == "HumanEval" and not execute:
                continue
            if text not in verdicts:
                code = problem.task == "HumanEval"
                verdicts[text] = judge.passes(problem.program(text)) if code else problem.solved(text)
            by_seed.setdefault(line["repeat"], []).append(verdicts[text])
    return scores


def table_4(scores: Scores, seeds: int) -> tables.Table:
    """The paper's Table 4: our methods, then the paper's, in per cent."""
    names = list(dict.fromkeys(name for methods in scores.values() for name in methods))
    known = {(row["benchmark"], row["temperature"]): row for row in tables.paper()["quality"]}
    theirs = [key for key in next(iter(known.values())) if key not in ("benchmark", "temperature")]
    rows = []
    for benchmark, temperature in sorted(scores, key=lambda key: (BENCHMARKS.index(key[0]), key[1])):
        methods = scores[benchmark, temperature]
        count = max((len(verdicts) for seed in methods.values() for verdicts in seed.values()), default=0)
        mine = [percent(methods[name]) if name in methods else tables.NOTHING for name in names]
        row = known.get((benchmark, temperature), {})
        paper = [_paper(row[key]) if key in row else tables.NOTHING for key in theirs]
        rows.append((benchmark, f"{temperature:g}", str(count) if count else tables.NOTHING, *mine, *paper))
    headings = [*(f"ours: {name}" for name in names), *(f"paper: {key}" for key in theirs)]
    return tables.Table(
        "quality",
        "Task quality (Table 4)",
        "Per cent solved: HumanEval pass@1, GSM8K accuracy; above temperature 0 the mean ± standard deviation of "
        f"{seeds} seeds. The paper's model is Llama-3-8B.",
        ("Benchmark", "Temperature", "Problems", *headings),
        rows,
    )


def percent(by_seed: Mapping[int, list[bool]]) -> str:
    """The share of problems solved, in per cent: its mean over seeds, and their standard deviation."""
    shares = [100 * float(np.mean(verdicts)) for verdicts in by_seed.values()]
    if not shares:
        return NOT_JUDGED
    spread_of = f" ± {np.std(shares, ddof=1):.1f}" if len(shares) > 1 else ""
    return f"{np.mean(shares):.1f}{spread_of}"


def _paper(figure: Mapping[str, float | None]) -> str:
    return f"{figure['value']}" + (f" ± {figure['spread']}" if figure["spread"] is not None else "")
