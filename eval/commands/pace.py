"""`python -m eval pace --ckpt CKPT --prompt TEXT`: watch what each round of an answer drafts and verifies.

The answer is decoded as users get it, a round at a time: which of its tokens were drafted, which stood in the text
already and which are the target's own, and how many nodes each round verified for them.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table
from rich.text import Text as Coloured

from eval.commands.flags import add_json_argument, add_out_argument, decoding_request
from eval.runs.provenance import machine, save
from eval.show import plots
from frspec_jax import api, compile_cache
from frspec_jax.api import Draft, Generator, Request
from frspec_jax.commands import results_console
from frspec_jax.errors import UserError
from frspec_jax.flags import add_dtype_flag
from frspec_jax.state import COPIED, DRAFTED, OWN

ORIGINS = ("the target's own", "drafted", "copied")
STYLES = ("default", "bold green", "bold magenta")  # in the terminal
COLOURS = ("#000000", plots.COLOURS[2], plots.COLOURS[3])  # in the picture
LINE = 124  # characters of the picture's lines


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round did."""

    size: int  # nodes verified
    levels: int  # drafted
    pieces: list[str]  # the tokens that it emitted, as text
    origins: list[int]  # of each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument(
        "--draft", metavar="NAME", help="a draft's name or folder (default: the first that the checkpoint had)"
    )
    parser.add_argument("--draft-vocab", metavar="N", help="V', a number, full or a share (default: as users get it)")
    add_dtype_flag(parser)
    parser.add_argument("--max-new-tokens", type=int, default=160, metavar="N", help="of the answer (default: 160)")
    add_out_argument(parser, "a picture of it goes there")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    request = decoding_request(args)
    compile_cache.enable()
    model = api.load(args.ckpt, Draft(args.draft, args.draft_vocab, pace="auto"), dtype=args.dtype)
    if model.drafting.pace is None:
        raise UserError(f"{args.ckpt} holds no draft to watch; add one with python -m train eagle or convert eagle")
    first, rounds = watched(model, args.prompt, request)
    if not rounds:
        raise UserError("the answer is one token, which no round made; give another --prompt")
    show(model, first, rounds)
    if args.out is not None:
        title = plots.heading(model.checkpoint.path.resolve().name, machine())
        plots.save(drawn(first, rounds, title), args.out, "pace")
    save(args.json, {"machine": machine(), "sizes": model.drafting.pace.sizes, **figures(rounds)})


def watched(model: Generator, prompt: str, request: Request) -> tuple[str, list[Round]]:
    """An answer's first token, which came with the prompt, and its rounds."""
    assert model.drafting.pace is not None
    tokenizer, rounds = model.checkpoint.tokenizer, []
    with model.begin(model.encode(prompt, request), request) as text:
        said, first = 1, tokenizer.decode(text.tokens)
        shown = first
        while not text.finished:
            text.advance(1)
            pieces = []
            for count in range(said + 1, text.emitted + 1):  # a token's text depends on those before it
                whole = tokenizer.decode(text.tokens[:count])
                pieces.append(whole[len(shown) :])
                shown = whole
            state, size = text.state, model.drafting.pace.sizes[int(text.state.pulse.size)]
            origins = np.asarray(state.origins)[said : text.emitted].tolist()
            rounds.append(Round(size, int(state.pulse.levels), pieces, origins))
            said = text.emitted
    return first, rounds


def figures(rounds: list[Round]) -> dict[str, Any]:
    """What the rounds did, in numbers."""
    origins = [origin for one in rounds for origin in one.origins]
    return {
        "rounds": len(rounds),
        "tokens": len(origins),
        "tokens_by_origin": {name: origins.count(number) for number, name in enumerate(ORIGINS)},
        "by_round": [{"nodes": r.size, "levels": r.levels, "tokens": len(r.origins)} for r in rounds],
    }


def show(model: Generator, first: str, rounds: list[Round]) -> None:
    """The answer in colours, and rounds by what they verified."""
    console = results_console()
    answer = Coloured(first)
    for one in rounds:
        for piece, origin in zip(one.pieces, one.origins, strict=True):
            answer.append(piece, STYLES[origin])
    console.print(answer)
    table = Table(box=box.SIMPLE_HEAD, title=f"{machine()}: {len(rounds)} rounds")
    for heading in ("nodes verified", "rounds", "levels drafted", "tokens a round", *ORIGINS):
        table.add_column(heading, justify="right")
    assert model.drafting.pace is not None
    for size in model.drafting.pace.sizes:
        these = [one for one in rounds if one.size == size]
        if these:
            origins = [origin for one in these for origin in one.origins]
            table.add_row(
                str(size),
                str(len(these)),
                f"{np.mean([one.levels for one in these]):.1f}",
                f"{len(origins) / len(these):.2f}",
                *(str(origins.count(kind)) for kind in (OWN, DRAFTED, COPIED)),
            )
    console.print(table)


def drawn(first: str, rounds: list[Round], title: str) -> Figure:
    """The answer, each token in the colour of how it came, over the nodes that each round verified."""
    lines: list[list[tuple[str, int]]] = [[]]
    for piece, origin in [
        (first, 0),
        *((p, o) for one in rounds for p, o in zip(one.pieces, one.origins, strict=True)),
    ]:
        shown = "".join(c if c.isprintable() or c == "\n" else "·" for c in piece)
        for number, part in enumerate(shown.split("\n")):
            if number or sum(len(text) for text, _ in lines[-1]) + len(part) > LINE:
                lines.append([])
            lines[-1].append((part, origin))
    figure = Figure(figsize=(10, 1.6 + 0.22 * len(lines)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(0.22 * len(lines) + 0.2, 1.4))
    above.axis("off")
    above.set_title(title, fontsize="medium", loc="left")
    above.set_xlim(0, LINE)
    above.set_ylim(-len(lines), 0.5)
    for row, line in enumerate(lines):
        column = 0
        for text, origin in line:
            above.text(
                column, -row, plots.plain(text), color=COLOURS[origin], family="monospace", fontsize=8.5, va="top"
            )
            column += len(text)
    for place, one in enumerate(rounds):
        kind = max(one.origins) if len(one.origins) > 1 else 0
        below.bar(place, one.size, color="#dddddd", width=0.9)
        below.bar(place, len(one.origins), color=COLOURS[kind], width=0.9)
    for name, colour in zip(ORIGINS, COLOURS, strict=True):
        below.bar(0, 0, color=colour, label=name)
    below.bar(0, 0, color="#dddddd", label="verified")
    below.legend(ncols=4, fontsize="small", frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    below.spines[["top", "right"]].set_visible(False)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    below.set_xlabel("round")
    below.set_ylabel("tokens, nodes")
    return figure
