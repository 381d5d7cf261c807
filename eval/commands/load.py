"""`python -m eval load --url http://127.0.0.1:8000/v1`: first token and time between tokens as requests come faster.

Against any server with OpenAI's API, so that another engine can be measured beside ours. Requests arrive at random (a
Poisson process) and wait for nobody: at a rate that a server cannot hold, waiting grows and shows. A key is read from
the variable OPENAI_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
from pathlib import Path
from typing import Any

from rich.table import Table

from eval.commands.flags import add_json_argument, add_out_argument, progress_bar
from eval.data.questions import of_tasks, read_questions, spread
from eval.methods import traffic
from eval.runs.provenance import save
from eval.show import load_plots
from frspec_jax.commands import results_console
from frspec_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="a server (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="as the server calls it (default: the first that it serves)")
    parser.add_argument(
        "--rates",
        default="inf",
        metavar="R,R,...",
        help="requests a second, one run each; inf: all at once (default: inf)",
    )
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="of each run (default: 32)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="questions, as for the other commands (default: a sample)"
    )
    parser.add_argument("--tasks", metavar="TASK,...", help="MT, Conv, RAG, Math, QA, Summ, Code (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of an answer (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, and of what is drawn (default: 0)")
    parser.add_argument(
        "--seconds", type=float, default=300, metavar="S", help="that a request may take (default: 300)"
    )
    parser.add_argument(
        "--vanilla", action="store_true", help="ask our server to decode without drafts (its field 'speculative')"
    )
    add_json_argument(parser)
    add_out_argument(parser, "draw the percentiles by rate here")


def run(args: argparse.Namespace) -> None:
    rates = rates_of(args.rates)
    for flag, value, least in (("--requests", args.requests, 1), ("--max-new-tokens", args.max_new_tokens, 1)):
        if value < least:
            raise UserError(f"{flag} {value} must be at least {least}")
    if not (math.isfinite(args.seconds) and args.seconds > 0):
        raise UserError(f"--seconds {args.seconds} must be a positive number of seconds")
    if not 0 <= args.temperature <= 2:
        raise UserError(f"--temperature {args.temperature} must be from 0 to 2, which is all that servers take")
    questions = spread(of_tasks(read_questions(args.data), args.tasks), None)
    prompts = [questions[n % len(questions)].first for n in range(args.requests)]
    figures = asyncio.run(measure(args, rates, prompts))
    show(figures)
    save(args.json, figures)
    if args.out is not None:
        print(f"drawn in {args.out}: {load_plots.by_rate(figures, args.out)}")
    if not any(row["answered"] for row in figures["rates"]):
        raise UserError(f"--url {args.url} answered no request ({figures['rates'][0]['errors']}); see the server's log")


def rates_of(text: str) -> list[float]:
    """What --rates lists."""
    rates = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not rate > 0:
            raise UserError(f"--rates {text} must be positive numbers, or inf, with commas between them")
        rates.append(rate)
    return rates


async def measure(args: argparse.Namespace, rates: list[float], prompts: list[traffic.Messages]) -> dict[str, Any]:
    """The figures of every rate, one run after the other."""
    url, key = args.url.rstrip("/"), os.environ.get("OPENAI_API_KEY")
    served = await traffic.models_of(url, key)
    model = args.model or (served[0] if served else None)
    if model is None or model not in served:
        raise UserError(f"--model {model}: the server serves {', '.join(served) or 'nothing'}; name one of those")
    fields: dict[str, Any] = {"max_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    if args.vanilla:
        fields["speculative"] = False
    target = traffic.Target(url, model, key, fields, args.seconds)
    await traffic.run(target, prompts[:1], [0.0])  # what a server does once, it has done
    rows = []
    with progress_bar() as progress:
        for rate in progress.track(rates, description="rates"):
            met = await traffic.run(target, prompts, traffic.arrivals(rate, len(prompts), args.seed).tolist())
            rows.append(traffic.summary(rate, met))
    return {"url": url, "model": model, "fields": fields, "prompts": len(prompts), "rates": rows}


def show(figures: dict[str, Any]) -> None:
    """A row a rate."""
    table = Table(title=f"{figures['model']}, {figures['prompts']} requests a rate, {figures['fields']}")
    headings = (
        "rate",
        "answered",
        "tokens/s",
        "at once",
        "first token p50, p90, p99",
        "between tokens",
        "between chunks",
    )
    for heading in (*headings, "errors"):
        table.add_column(heading, justify="right", no_wrap=heading in ("rate", "answered"))
    for row in figures["rates"]:
        table.add_row(
            "at once" if row["rate"] is None else f"{row['rate']:g}/s",
            f"{row['answered']} of {row['requests']}",
            f"{row['tokens_per_second']:.1f}",
            str(row["most_at_once"]),
            *(_milliseconds(row[name]) for name in ("first_token", "between_tokens", "between_chunks")),
            ", ".join(f"{count} {kind}" for kind, count in row["errors"].items()) or "none",
        )
    results_console().print(table)
    print(
        "between tokens: of each answer, its time after the first token by its further tokens; between chunks: pauses"
    )


def _milliseconds(found: dict[str, float] | None) -> str:
    return "" if found is None else ", ".join(f"{1e3 * found[f'p{p}']:.0f}" for p in traffic.PERCENTILES) + " ms"
