"""`python -m eval stages MODEL`: where a round's time goes, at a published model's sizes.

Speed hangs on sizes, not on what the weights say, so random ones do: every stage of a round is timed
on its own, and whole rounds and vanilla steps beside it, against the time to read what they must.
What random weights cannot give is an accepted length. Where the paper reports one for the model, the
tokens/s that it would make of these rounds are printed, and labelled so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from eval.commands.flags import add_json_argument, add_out_argument, sizes_of
from eval.methods.parts import Stage, draft_stages, head_stages, round_us, target_stages
from eval.methods.shape_peer import step_us
from eval.runs import provenance
from eval.runs.provenance import save
from eval.show import plots
from frspec_jax import compile_cache
from frspec_jax.commands import results_console
from frspec_jax.config import VANILLA, ModelConfig, TreeConfig
from frspec_jax.defaults import defaults
from frspec_jax.drafters.base import NO_WEIGHTS, Vanilla
from frspec_jax.errors import UserError
from frspec_jax.flags import IMPLEMENTATIONS, add_tree_flags, tree_of
from frspec_jax.plan import Plan
from frspec_jax.presets import eagle_of, model_config, random_weights
from frspec_jax.state import Weights
from frspec_jax.vocabulary import crop
from pallas_kernels import timing
from pallas_kernels.dispatch import Kernels
from pallas_kernels.models import SHAPES

VOCABULARIES = "full,65536,32768,16384,8192"  # those of the paper that a model has
PAPER = resources.files("eval").joinpath("data/paper.json")
PAPER_NAMES = {"llama3-8b": "Llama-3-8B", "llama3.2-1b": "Llama-3.2-1B", "qwen2-7b": "Qwen-2-7B"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", choices=SHAPES, metavar="MODEL", help=f"whose sizes: one of {', '.join(SHAPES)}")
    parser.add_argument(
        "--draft-vocab",
        metavar="N,N,...",
        help=f"sub-vocabularies: numbers, full, or shares such as 1/4 (default: of {VOCABULARIES} what the model has)",
    )
    add_tree_flags(parser)
    parser.add_argument(
        "--context",
        nargs="+",
        type=int,
        default=[512, 2048, 8192],
        metavar="N",
        help="tokens in the cache (default: 512 2048 8192)",
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="of a measurement (default: 20)")
    parser.add_argument("--kernels", choices=IMPLEMENTATIONS, default="auto")
    parser.add_argument("--draft-int8", action="store_true", help="the draft's head in int8")
    parser.add_argument("--peer-step", action="store_true", help="time a step of transformers (PyTorch) too")
    add_out_argument(parser, "a stacked-bar plot of the stages goes there")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    if args.rounds < 1 or min(args.context) < 1:
        raise UserError(f"--rounds {args.rounds} and --context {min(args.context)}: give at least 1 of each")
    compile_cache.enable()
    figures = figures_of(args, tree_of(args, defaults().tree))
    show(figures)
    save(args.json, figures)
    if args.out:
        plot(figures, args.out)


def figures_of(args: argparse.Namespace, tree: TreeConfig) -> dict[str, Any]:
    """All figures for `args.model`: stages and rounds by context and V'."""
    config, dtype = model_config(args.model), defaults().dtype
    kernels = Kernels.all(args.kernels)
    plan = Plan(config, eagle_of(config, kernels), tree, kernels=kernels)
    vanilla = dataclasses.replace(plan, drafter=Vanilla(), tree=VANILLA)
    weights = jax.jit(functools.partial(random_weights, config, config.vocab_size, dtype))(jax.random.key(0))
    sizes = [v for v in sizes_of(args.draft_vocab or VOCABULARIES, config.vocab_size) if _fits(v, args, config)]
    speed = timing.bandwidth(2048 if jax.default_backend() == "gpu" else 256)
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(args.context) * (len(sizes) + 1))
        for context in args.context:
            progress.update(task, description=f"context {context}")
            bare = Weights(weights.target, NO_WEIGHTS)
            steps = _timed(target_stages(vanilla, bare, context, dtype), bare, args.rounds, speed)
            rows.append(_row("vanilla", None, context, steps, round_us(vanilla, bare, context, dtype, args.rounds)))
            progress.advance(task)
            shared = _timed(draft_stages(plan, weights, context, dtype), weights, args.rounds, speed)
            shared += _timed(target_stages(plan, weights, context, dtype), weights, args.rounds, speed)
            for vocabulary in sizes:
                size = config.vocab_size if vocabulary == "full" else int(vocabulary)
                head = crop(weights.target.head, np.arange(size), args.draft_int8)
                mine = dataclasses.replace(weights, draft=dataclasses.replace(weights.draft, head=head))
                stages = shared + _timed(head_stages(plan, mine, dtype), mine, args.rounds, speed)
                name = "EAGLE-2" if size == config.vocab_size else f"FR-Spec {size:,}"
                whole = round_us(plan, mine, context, dtype, args.rounds)
                rows.append(_row(name, size, context, stages, whole))
                progress.advance(task)
    figures = {
        "shapes": args.model,
        "random_weights": True,
        "dtype": jnp.dtype(dtype).name,
        "tree": dataclasses.asdict(tree),
        "kernels": args.kernels,
        "draft_int8": args.draft_int8,
        "bandwidth_gb_per_second": round(speed / 1e9, 1),
        "rows": rows,
    }
    if args.peer_step:
        figures["transformers_step_us"] = {str(c): round(us, 1) for c, us in step_us(config, args.context).items()}
    _with_paper(figures)
    return figures


def _fits(vocabulary: int | str, args: argparse.Namespace, config: ModelConfig) -> bool:
    """Whether a model has so many tokens: one that was asked for must, one of the paper's may be left out."""
    if vocabulary == "full" or int(vocabulary) < config.vocab_size:
        return True
    if args.draft_vocab:
        raise UserError(
            f"--draft-vocab {vocabulary}: {args.model} has {config.vocab_size:,} tokens; give fewer, or full"
        )
    return False


def _timed(stages: Iterator[Stage], weights: Weights, calls: int, speed: float) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage.name,
            "times": stage.times,
            "bytes": stage.bytes,
            "us": round(timing.looped(stage.step, weights, stage.carry, calls), 2),
            "floor_us": round(1e6 * stage.bytes / speed, 2),
        }
        for stage in stages
    ]


def _row(name: str, vocabulary: int | None, context: int, stages: list[dict[str, Any]], whole: float) -> dict[str, Any]:
    floor = sum(s["floor_us"] * s["times"] for s in stages if not s["stage"].startswith("("))
    return {
        "name": name,
        "draft_vocab": vocabulary,
        "context": context,
        "stages": stages,
        "round_us": round(whole, 1),
        "floor_us": round(floor, 1),
        "times_floor": round(whole / floor, 3),
    }


def _with_paper(figures: dict[str, Any]) -> None:
    """Add the tokens/s that the paper's accepted lengths would make of these rounds."""
    name = PAPER_NAMES.get(figures["shapes"])
    tables = [t for t in json.loads(PAPER.read_text())["tables"] if t["measure"] == "accepted_length"]
    known = [row for table in tables if table["model"] == name for row in table["rows"]]
    lengths = {row["draft_vocab"]: row["average"] for row in known if row["corpus"] in (None, "SlimPajama")}
    for context in {row["context"] for row in figures["rows"]}:
        mine = [row for row in figures["rows"] if row["context"] == context]
        step = next(row["round_us"] for row in mine if row["name"] == "vanilla")
        for row in mine:
            if not lengths:
                continue
            whole = max(lengths)  # the paper rounds its full vocabulary, and names it by what it holds
            length = {"vanilla": 1.0, "EAGLE-2": lengths[whole]}.get(row["name"], lengths.get(row["draft_vocab"]))
            if length is not None:
                row["accepted_length_of_the_paper"] = length
                row["tokens_per_second_with_it"] = round(1e6 * length / row["round_us"], 1)
                row["speed_up_with_it"] = round(length * step / row["round_us"], 3)


def show(figures: dict[str, Any]) -> None:
    """A table by context: milliseconds by stage, the round, its floor."""
    console = results_console()
    for context in dict.fromkeys(row["context"] for row in figures["rows"]):
        about = f"{figures['shapes']} with random weights, {figures['dtype']}, context {context:,}"
        speed = f"{figures['bandwidth_gb_per_second']:,} GB/s"
        table = Table(title=f"{provenance.machine()}, {speed}\n{about}; milliseconds a round", box=box.SIMPLE_HEAD)
        headings = ["method", "draft", "of it heads", "verify", "round", "floor", "× floor"]
        if any("speed_up_with_it" in row for row in figures["rows"]):
            headings += ["tokens/s", "× vanilla"]
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
        for row in figures["rows"]:
            if row["context"] == context:
                table.add_row(*_cells(row)[: len(headings)])
        console.print(table)
    for context, us in figures.get("transformers_step_us", {}).items():
        print(f"transformers (PyTorch), a step at context {context}: {us / 1e3:.2f} ms")
    print("draft, verify: the stages' own times summed; round: the engine's loop")
    if any("speed_up_with_it" in row for row in figures["rows"]):
        print("tokens/s, × vanilla: what the paper's accepted lengths (SlimPajama) would make of these rounds;")
        print("random weights have none of their own")


def _cells(row: dict[str, Any]) -> list[str]:
    def total(*beginnings: str) -> float:
        return sum(s["us"] * s["times"] for s in row["stages"] if s["stage"].startswith(beginnings)) / 1e3

    drafts = row["draft_vocab"] is not None
    ours = [f"{total('extend', 'level', 'beams'):.2f}", f"{total('level: head'):.2f}"] if drafts else ["", ""]
    paper = [str(row.get("tokens_per_second_with_it", "")), str(row.get("speed_up_with_it", ""))]
    verify = f"{total('verify', 'accept'):.2f}"
    whole = [f"{row['round_us'] / 1e3:.2f}", f"{row['floor_us'] / 1e3:.2f}", f"{row['times_floor']:.2f}"]
    return [row["name"], *ours, verify, *whole, *paper]


def plot(figures: dict[str, Any], folder: Path) -> None:
    """Stacked bars: a round's stages, by method, at the shortest context."""
    context = min(row["context"] for row in figures["rows"])
    rows = [row for row in figures["rows"] if row["context"] == context]
    names = list(dict.fromkeys(s["stage"] for row in rows for s in row["stages"] if not s["stage"].startswith("(")))
    drawn, (axes,) = plots.figure(9, 0.5 * len(rows) + 2.2)
    left = np.zeros(len(rows))
    for name, colour in zip(names, plots.COLOURS, strict=True):
        widths = [sum(s["us"] * s["times"] for s in row["stages"] if s["stage"] == name) / 1e3 for row in rows]
        axes.barh([row["name"] for row in rows], widths, left=left, label=name, color=colour)
        left += widths
    axes.plot([row["round_us"] / 1e3 for row in rows], range(len(rows)), "k|", markersize=16, label="whole round")
    axes.plot([row["floor_us"] / 1e3 for row in rows], range(len(rows)), "r|", markersize=16, label="floor")
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a round")
    axes.set_title(
        f"{figures['shapes']}, random weights, {figures['dtype']}, context {context}\n{provenance.machine()}"
    )
    drawn.legend(loc="outside lower center", ncols=5, fontsize="small")
    plots.save(drawn, folder, "stages")
