"""`python -m eval tune --ckpt CKPT`: find the V' and the draft tree that are fastest on this device, and keep them.

A setting is as good as its tokens a round (which the draft's quality decides) over its milliseconds a
round (which the device decides). Both are measured on sample prompts, one figure of the setting being
varied at a time, best first kept, until a whole pass changes nothing. The winner is then held against
vanilla decoding and what was used before, side by side, and written to DRAFT/tuned.json, which
`frspec_jax.load` and `generate` read; flags still win. What rounds with a pace cost here is measured anew too.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from eval.commands.flags import (
    add_json_argument,
    add_out_argument,
    add_question_arguments,
    decoding_request,
    sizes_of,
)
from eval.data.questions import read_questions, spread
from eval.methods import side_by_side
from eval.methods.search import Choice, Point, climb
from eval.runs import output, provenance
from eval.runs.provenance import save
from eval.show import plots, tune_plots
from frspec_jax import api, compile_cache, tuned
from frspec_jax.api import NO_DRAFT, Draft, Prompt, Request
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.commands import results_console
from frspec_jax.config import VANILLA
from frspec_jax.defaults import defaults
from frspec_jax.drafting import preferred_tree
from frspec_jax.errors import UserError
from frspec_jax.flags import add_dtype_flag
from frspec_jax.locks import folder_lock
from frspec_jax.vocabulary import Ranking

# What is tried where no flag says otherwise: a pass over many tokens is dear on a CPU, and nearly free on a GPU.
SPACES = {
    "cpu": {"size": "4,6,8,12,16,24", "depth": "2,3,4,5", "top_k": "2,4,8"},
    "gpu": {"size": "16,32,48,60,96", "depth": "4,5,6,7,8", "top_k": "4,8,10,16"},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--draft", metavar="NAME", help="a draft's name or folder (default: the first that the checkpoint had)"
    )
    parser.add_argument(
        "--draft-vocab",
        default="full,1/2,1/4,1/8,1/16",
        metavar="N,N,...",
        help="sub-vocabularies to try: numbers, full, or shares (default: full,1/2,1/4,1/8,1/16)",
    )
    space = SPACES["cpu"]
    for flag, name, letter in (
        ("--tree-size", "size", "N"),
        ("--depth", "depth", "D"),
        ("--draft-top-k", "top_k", "K"),
    ):
        parser.add_argument(
            flag,
            metavar=f"{letter},{letter},...",
            help=f"to try (default: CPU {space[name]}, GPU {SPACES['gpu'][name]})",
        )
    add_question_arguments(parser, questions=7, tokens=64)
    add_dtype_flag(parser)
    add_out_argument(parser, "where the plots go (default: the draft's folder)")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    request = decoding_request(args)
    compile_cache.enable()
    checkpoint = Checkpoint.open(args.ckpt)
    folder = checkpoint.draft_folder(args.draft)
    if folder is None:
        raise UserError(f"{args.ckpt} holds no draft to tune; add one with python -m train eagle or convert eagle")
    out: Path = args.out or folder
    output.check_folder(out)
    output.check_folder(folder, "--draft")  # where the setting goes
    with folder_lock(folder, f"--draft {folder}"):
        search(args, request, checkpoint, folder, out)


def search(args: argparse.Namespace, request: Request, checkpoint: Checkpoint, folder: Path, out: Path) -> None:
    """Climb to the fastest setting of the draft in `folder`, keep it there, and draw what was met in `out`."""
    dtype = defaults().dtype if args.dtype is None else jnp.dtype(args.dtype)
    space = space_of(args, checkpoint)
    texts = [question.first for question in spread(read_questions(args.data), args.questions)]
    bench = Bench(checkpoint, args.draft, dtype, request, texts)
    if (damage := tuned.forget_damaged(folder, dtype)) is not None:
        print(f"note: {damage.on_the_command_line}; this run replaces it", file=sys.stderr)
    start = start_of(checkpoint, args.draft, dtype)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("settings", total=sum(len(values) for values in space.values()))
        best, points = climb(start, space, bench.measure, lambda: progress.advance(bar))
    rivals = bench.side_by_side({"before": start, "best": best})
    if rivals["before"]["tokens_per_second"] > rivals["best"]["tokens_per_second"]:
        best, rivals["best"] = start, rivals["before"]  # what was measured one after the other does not hold up
    vanilla = rivals["vanilla"]["tokens_per_second"]
    title = plots.heading(f"{checkpoint.path.resolve().name}, draft {folder.name},", tuned.machine())
    plots.save(tune_plots.sweeps(best, points, space, vanilla, title), out, "tuned-sweeps")
    plots.save(tune_plots.trade_off(best, points, vanilla, title), out, "tuned-trade-off")
    save(args.json, figures_of(bench, folder.name, points, rivals))
    pays = rivals["best"]["speed_up"] > 1
    setting, facts = (best.setting, rivals["best"]) if pays else (tuned.NO_TREE, rivals["vanilla"])
    file = tuned.write(folder, dtype, setting, {**facts, "versions": provenance.versions()})
    show(best, rivals)
    if pays:
        print(f"{file} has it: load and generate use its V' on this device, with --pace fixed its tree too")
    else:
        print(f"No setting beats vanilla decoding with a fixed tree on this device, as {file} says: with --pace fixed")
        print(
            "load and generate decode without a draft, unless a flag asks for some of it (--draft-vocab, --tree-size)."
        )
    print(f"Plots are in {out}.")
    with Console(stderr=True).status("measuring what rounds cost"):
        paced = api.load(checkpoint, Draft(args.draft), dtype=dtype, target=bench.vanilla.weights.target)
        paced.measure_costs()
    print("With --pace auto, the default, rounds go by what they were measured to cost just now.")


def figures_of(bench: Bench, draft: str, points: list[Point], rivals: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything that was measured, for --json."""
    rows = [
        {
            **dataclasses.asdict(one.choice),
            "accepted_length": round(one.accepted_length, 3),
            "round_ms": round(one.round_ms, 3),
            "tokens_per_second": round(one.rate, 2),
        }
        for one in points
    ]
    return {
        "draft": draft,
        "dtype": jnp.dtype(bench.dtype).name,
        "prompts": len(bench.prompts),
        "max_new_tokens": bench.request.max_new_tokens,
        "points": rows,
        "side_by_side": rivals,
    }


def space_of(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, list[int]]:
    """The values to try for each figure of a setting."""
    vocab_size = checkpoint.config.vocab_size
    sizes = [vocab_size if size == "full" else int(size) for size in sizes_of(args.draft_vocab, vocab_size)]
    file = checkpoint.path / "ranking.npz"
    reach = Ranking.load(file).reach if file.is_file() else 0
    if not reach:
        sizes = [vocab_size]  # nothing to crop by
    sizes = [size if size == vocab_size else min(size, reach) for size in sizes]  # a token map is only so long
    space = {"draft_vocab": sorted(set(sizes), reverse=True)}
    defaults = SPACES["cpu" if jax.default_backend() == "cpu" else "gpu"]
    for flag, name, least in (("--tree-size", "size", 2), ("--depth", "depth", 1), ("--draft-top-k", "top_k", 1)):
        text = getattr(args, flag[2:].replace("-", "_")) or defaults[name]
        values = [part.strip() for part in text.split(",")]
        if not all(value.isdecimal() and int(value) >= least for value in values):
            raise UserError(f"{flag} {text}: give whole numbers from {least} on, with commas between them")
        space[name] = sorted({int(value) for value in values})
    return space


def start_of(checkpoint: Checkpoint, draft: str | None, dtype: Any) -> Choice:
    """The setting that is used without tuning, or since the last tuning."""
    tree = preferred_tree(checkpoint, Draft(draft, pace="fixed"), dtype)
    tree = defaults(dtype).tree if tree == VANILLA else tree  # an earlier tuning found that no tree pays
    model = api.load(checkpoint, Draft(draft, tree=tree), dtype=dtype)
    assert model.draft_vocab is not None
    return Choice(model.draft_vocab, model.tree.size, model.tree.depth, model.tree.top_k)


class Bench:
    """A checkpoint and prompts to measure settings with; the target's weights are loaded once."""

    def __init__(
        self, checkpoint: Checkpoint, draft: str | None, dtype: Any, request: Request, texts: Sequence[Prompt]
    ) -> None:
        self.checkpoint, self.draft, self.dtype, self.request = checkpoint, draft, dtype, request
        self.vanilla = api.load(checkpoint, NO_DRAFT, dtype=dtype)
        self.prompts = [self.vanilla.encode(text) for text in texts]

    def model(self, choice: Choice) -> api.Generator:
        """The draft with a setting."""
        draft = Draft(self.draft, choice.draft_vocab, choice.tree)
        return api.load(self.checkpoint, draft, dtype=self.dtype, target=self.vanilla.weights.target)

    def measure(self, choice: Choice) -> Point:
        """Answer the prompts with a setting."""
        model = self.model(choice)
        model.warm_up()
        return point(choice, [model.generate_ids(prompt, self.request) for prompt in self.prompts])

    def side_by_side(self, choices: dict[str, Choice]) -> dict[str, dict[str, Any]]:
        """Vanilla and some settings, interleaved: what each does, and its speed-up over vanilla."""
        models = {"vanilla": self.vanilla, **{name: self.model(choice) for name, choice in choices.items()}}
        answers = list(side_by_side.interleaved(models, self.prompts, self.request))
        points = {name: point(None, [answer[name] for answer in answers]) for name in models}
        return {
            name: {
                "tokens_per_second": round(one.rate, 2),
                "speed_up": round(one.rate / points["vanilla"].rate, 3),
                "accepted_length": round(one.accepted_length, 3),
                "round_ms": round(one.round_ms, 3),
            }
            for name, one in points.items()
        }


def point(choice: Choice | None, results: list[api.Result]) -> Point:
    """What answers say of a setting: tokens pooled over rounds, and the median over prompts of a round's time."""
    rounds = sum(result.rounds for result in results)
    side_by_side.check_rounds(rounds)
    tokens = sum(len(result.tokens) - 1 for result in results)
    times = [1e3 * result.decode_seconds / result.rounds for result in results if result.rounds]
    return Point(choice or Choice(0, 1, 0, 1), tokens / rounds, statistics.median(times))


def show(best: Choice, rivals: dict[str, dict[str, Any]]) -> None:
    """The outcome."""
    table = Table(
        title=f"{provenance.machine()}: V' {best.draft_vocab:,}, {best.tree.size} nodes, depth {best.depth}, "
        f"top-k {best.top_k}"
    )
    for heading in ("setting", "tokens/s", "× vanilla", "accepted", "round ms"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for name, row in rivals.items():
        table.add_row(name, *(str(value) for value in row.values()))
    results_console().print(table)
