"""`python -m eval speed --shapes MODEL --random-weights`: where a round's time goes, at a published model's sizes.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from eval import measure, plots
from eval.options import add_out_argument, save, sizes_of
from eval.shape_peer import step_us
from frspec_jax import api, compile_cache, engine, kv_cache, llama
from frspec_jax.commands import results_console
from frspec_jax.config import VANILLA, ModelConfig, Sampling, TreeConfig
from frspec_jax.drafters import eagle
from frspec_jax.drafters.base import Vanilla
from frspec_jax.errors import UserError
from frspec_jax.generate import tree_of
from frspec_jax.presets import eagle_of, model_config, random_weights, state_at
from frspec_jax.tree import Beam, accepted_path, rerank
from frspec_jax.vocabulary import crop
from pallas_kernels import timing
from pallas_kernels.dispatch import Kernels
from pallas_kernels.models import SHAPES
from pallas_kernels.products import einsum_f32
from pallas_kernels.subvocab_head import subvocab_top_k
from pallas_kernels.timing import nudged
from pallas_kernels.visibility import bit_words, causal

VOCABULARIES = "full,65536,32768,16384,8192"  # those of the paper that a model has
PAPER = Path(__file__).with_name("data") / "paper.json"
PAPER_NAMES = {"llama3-8b": "Llama-3-8B", "llama3.2-1b": "Llama-3.2-1B", "qwen2-7b": "Qwen-2-7B"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a round: `step(weights, carry)`, the carry to begin with, and the bytes that it must read."""

    name: str
    times: int  # how often a round runs it
    step: Callable[[Any, Any], Any]
    carry: Any
    bytes: int


def size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def kv_bytes(config: ModelConfig, context: int, dtype: jnp.dtype) -> int:
    """Bytes of one layer's keys and values for `context` tokens."""
    return 2 * context * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def target_stages(plan: engine.Plan, weights: engine.Weights, context: int, dtype: jnp.dtype) -> Iterator[Stage]:
    """What a round does with the target, whatever V' is; of vanilla's plan, what a step does."""
    config, nodes, depth = plan.config, plan.tree.size, plan.tree.depth
    capacity = kv_cache.rounded_capacity(context + 64 + plan.margin)
    n = jnp.int32(context)
    chain = jnp.arange(nodes, dtype=jnp.int32)
    words = causal(nodes)

    def layers(held: engine.Weights, carry: Any) -> Any:
        tokens, cache = carry
        features, cache = llama.forward(held.target, config, tokens, n + chain, cache, n, words, plan.kernels)
        return nudged(tokens, features), cache

    def head(held: engine.Weights, features: Array) -> Array:
        return nudged(features, jnp.argmax(llama.logits(held.target, features), -1))

    caches = kv_cache.empty(config, capacity, dtype)
    features = jnp.ones((nodes, config.hidden_size), dtype)
    live = config.num_layers * kv_bytes(config, context, dtype)
    yield Stage("verify: layers", 1, layers, (chain, caches), size(weights.target.layers) + live)
    yield Stage("verify: head", 1, head, features, weights.target.head.nbytes)
    if plan.tree.size == 1:
        return
    line = jnp.minimum(chain, depth)
    drafted = engine.DraftTree(chain, jnp.maximum(chain - 1, 0), line, words)

    def commit(_: Any, carry: Any) -> Any:
        chosen, cache = carry
        path, drafts = accepted_path(drafted, chosen, depth)
        return nudged(chosen, drafts[None]), kv_cache.compact(cache, n, path)

    moved = 2 * config.num_layers * kv_bytes(config, depth, dtype)
    yield Stage("accept, compact", 1, commit, (chain, caches), moved)


def draft_stages(plan: engine.Plan, weights: engine.Weights, context: int, dtype: jnp.dtype) -> Iterator[Stage]:
    """What a round does with the draft, but for its head."""
    drafter, tree = plan.drafter, plan.tree
    assert isinstance(drafter, eagle.Eagle)
    k, n = tree.top_k, jnp.int32(context)
    hidden = plan.config.hidden_size
    cache = kv_cache.empty(drafter.config, kv_cache.rounded_capacity(context + 64 + plan.margin), dtype)[0]
    bytes_read = size(weights.draft.params) + kv_bytes(drafter.config, context, dtype)

    def extend(held: engine.Weights, carry: Any) -> Any:
        features, cache = carry
        pairs = jnp.arange(tree.depth + 1)
        outputs, cache = eagle.extend(
            held.draft.params, drafter.config, held.target.embedding[pairs], features, n + pairs, cache, n, n,
            causal(len(pairs)), drafter.kernels,
        )  # fmt: skip
        return nudged(features, outputs), cache

    def level(held: engine.Weights, carry: Any) -> Any:
        features, cache = carry
        visible = bit_words(jnp.eye(k, tree.draft_rows, dtype=bool))
        outputs, cache = eagle.extend(
            held.draft.params, drafter.config, held.target.embedding[jnp.arange(k)], features,
            jnp.full((k,), n), cache, n, n, visible, drafter.kernels,
        )  # fmt: skip
        return nudged(features, outputs), cache

    def beams(_: Any, scores: Array) -> Array:
        tokens = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (k, k))
        beam = Beam.start(tree, scores[0], tokens[0])
        for _level in range(1, tree.depth):
            beam, _parents = beam.grow(scores, tokens)
        return nudged(scores, rerank(tree, beam, jnp.int32(0)).depth)

    yield Stage("extend", 1, extend, (jnp.ones((tree.depth + 1, hidden), dtype), cache), bytes_read)
    yield Stage("level: layer", tree.depth - 1, level, (jnp.ones((k, hidden), dtype), cache), bytes_read)
    yield Stage("beams, re-rank", 1, beams, -jnp.arange(k * k, dtype=jnp.float32).reshape(k, k), 0)


def head_stages(plan: engine.Plan, weights: engine.Weights, dtype: jnp.dtype) -> Iterator[Stage]:
    """The draft's head as the engine runs it, and of that the bare product; once a level."""
    assert isinstance(plan.drafter, eagle.Eagle)
    k, kernels = plan.tree.top_k, plan.drafter.kernels

    def whole(held: engine.Weights, rows: Array) -> Array:
        kept = held.draft.head
        return nudged(rows, subvocab_top_k(rows, kept.weight, k, kept.scale, implementation=kernels.head)[0])

    def product(held: engine.Weights, rows: Array) -> Array:
        return nudged(rows, einsum_f32("mh,vh->mv", rows, held.draft.head.weight))

    for name, step in (("level: head, top-k", whole), ("(its product alone)", product)):
        rows = jnp.ones((k, plan.config.hidden_size), dtype)
        yield Stage(name, plan.tree.depth, step, rows, weights.draft.head.weight.nbytes)


def round_us(plan: engine.Plan, weights: engine.Weights, context: int, dtype: jnp.dtype, rounds: int) -> float:
    """Microseconds of a whole round, in the engine's own loop: the median of five loops of `rounds`."""
    capacity = kv_cache.rounded_capacity(context + rounds * (plan.tree.depth + 1) + plan.margin)

    def loop(held: engine.Weights, state: engine.DecodeState) -> engine.DecodeState:
        state = dataclasses.replace(state, length=jnp.int32(context), emitted=jnp.int32(1), finished=jnp.int32(0))
        return engine.decode_rounds(plan, held, state, jnp.int32(rounds))

    state = jax.jit(functools.partial(state_at, plan, capacity=capacity, dtype=dtype))(jnp.int32(context))
    return timing.looped(loop, weights, state, 1) / rounds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a published model's sizes", "in place of --ckpt; needs no weights")
    group.add_argument("--shapes", choices=SHAPES, metavar="MODEL", help=f"one of {', '.join(SHAPES)}")
    group.add_argument("--random-weights", action="store_true", help="goes with --shapes, and says what is measured")
    group.add_argument(
        "--context", nargs="+", type=int, default=[512, 2048, 8192], metavar="N",
        help="tokens in the cache (default: 512 2048 8192)",
    )  # fmt: skip
    group.add_argument("--rounds", type=int, default=20, metavar="N", help="of a measurement (default: 20)")
    group.add_argument("--kernels", choices=("auto", "pallas", "xla", "interpret"), default="auto")
    group.add_argument("--draft-int8", action="store_true", help="the draft's head in int8")
    group.add_argument("--peer-step", action="store_true", help="time a step of transformers (PyTorch) too")
    add_out_argument(group, "a stacked-bar plot of the stages goes there")


def run(args: argparse.Namespace) -> None:
    """The whole command: measure, show, write."""
    if not (args.shapes and args.random_weights) or args.ckpt is not None:
        raise UserError("--shapes MODEL and --random-weights go together, and in place of --ckpt")
    if args.rounds < 1 or min(args.context) < 1:
        raise UserError(f"--rounds {args.rounds} and --context {min(args.context)}: give at least 1 of each")
    compile_cache.enable()
    figures = figures_of(args, tree_of(args, api.defaults().tree))
    show(figures)
    save(args.json, figures)
    if args.out:
        plot(figures, args.out)


def figures_of(args: argparse.Namespace, tree: TreeConfig) -> dict[str, Any]:
    """All figures for `args.shapes`: stages and rounds by context and V'."""
    config, dtype = model_config(args.shapes), api.defaults().dtype
    kernels = Kernels(args.kernels, args.kernels)
    plan = engine.Plan(config, eagle_of(config, kernels), tree, Sampling(), (), kernels)
    vanilla = dataclasses.replace(plan, drafter=Vanilla(), tree=VANILLA)
    weights = jax.jit(functools.partial(random_weights, config, config.vocab_size, dtype))(jax.random.key(0))
    sizes = [v for v in sizes_of(args.draft_vocab or VOCABULARIES, config.vocab_size) if _fits(v, args, config)]
    speed = timing.bandwidth(2048 if jax.default_backend() == "gpu" else 256)
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(args.context) * (len(sizes) + 1))
        for context in args.context:
            progress.update(task, description=f"context {context}")
            bare = engine.Weights(weights.target, ())
            steps = _timed(target_stages(vanilla, bare, context, dtype), bare, args.rounds, speed)
            rows.append(_row("vanilla", None, context, steps, round_us(vanilla, bare, context, dtype, args.rounds)))
            progress.advance(task)
            shared = _timed(draft_stages(plan, weights, context, dtype), weights, args.rounds, speed)
            shared += _timed(target_stages(plan, weights, context, dtype), weights, args.rounds, speed)
            for vocabulary in sizes:
                size = config.vocab_size if vocabulary == "full" else int(vocabulary)
                head = crop(weights.target.head, np.arange(size), args.draft_int8)
                mine = weights.replace(draft=weights.draft.replace(head=head))
                stages = shared + _timed(head_stages(plan, mine, dtype), mine, args.rounds, speed)
                name = "EAGLE-2" if size == config.vocab_size else f"FR-Spec {size:,}"
                whole = round_us(plan, mine, context, dtype, args.rounds)
                rows.append(_row(name, size, context, stages, whole))
                progress.advance(task)
    figures = {
        "shapes": args.shapes, "random_weights": True, "dtype": jnp.dtype(dtype).name,
        "tree": dataclasses.asdict(tree), "kernels": args.kernels, "draft_int8": args.draft_int8,
        "bandwidth_gb_per_second": round(speed / 1e9, 1), "rows": rows,
    }  # fmt: skip
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
            f"--draft-vocab {vocabulary}: {args.shapes} has {config.vocab_size:,} tokens; give fewer, or full"
        )
    return False


def _timed(stages: Iterator[Stage], weights: engine.Weights, calls: int, speed: float) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage.name, "times": stage.times, "bytes": stage.bytes,
            "us": round(timing.looped(stage.step, weights, stage.carry, calls), 2),
            "floor_us": round(1e6 * stage.bytes / speed, 2),
        }
        for stage in stages
    ]  # fmt: skip


def _row(name: str, vocabulary: int | None, context: int, stages: list[dict[str, Any]], whole: float) -> dict[str, Any]:
    floor = sum(s["floor_us"] * s["times"] for s in stages if not s["stage"].startswith("("))
    return {
        "name": name, "draft_vocab": vocabulary, "context": context, "stages": stages, "round_us": round(whole, 1),
        "floor_us": round(floor, 1), "times_floor": round(whole / floor, 3),
    }  # fmt: skip


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
        table = Table(title=f"{measure.machine()}, {speed}\n{about}; milliseconds a round", box=box.SIMPLE_HEAD)
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
    axes.set_title(f"{figures['shapes']}, random weights, {figures['dtype']}, context {context}\n{measure.machine()}")
    drawn.legend(loc="outside lower center", ncols=5, fontsize="small")
    plots.save(drawn, folder, "stages")
