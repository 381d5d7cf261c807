"""`python -m eval demo --ckpt CKPT`: three prompts answered with FR-Spec as they come, then the comparison.

`make demo` runs it: vanilla decoding, EAGLE-2 with the full vocabulary, and FR-Spec, with the same
prompts in the same run.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from eval.commands.flags import add_json_argument, add_model_arguments, decoding_request, models
from eval.commands.speed import compare, show
from eval.runs.provenance import save
from frspec_jax.commands import results_console

PROMPTS = (
    "What should I pack for a hiking trip?",
    "Write a Python function that counts the vowels in a string.",
    "What are the main differences between cats and dogs?",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "full,1/4")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer (default: 128)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    request = decoding_request(args)
    _, methods = models(args)
    console = results_console()
    fr_spec = [*methods.values()][-1]
    with Console(stderr=True).status("compiling"):
        fr_spec.warm_up()
    for prompt in PROMPTS:
        console.print(f"\n{prompt}", style="bold")
        stream = fr_spec.stream(prompt, request)
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        assert stream.result is not None
        console.print(f"\n{stream.result.summary()}", style="dim", highlight=False)
    console.print()
    figures = compare(methods, [fr_spec.encode(prompt) for prompt in PROMPTS], request)
    show(figures)
    save(args.json, figures)
