"""`python -m eval draft-tree --ckpt CKPT --prompt TEXT`: a draft tree and its mask (the paper's Figures 3 and 4).

The tree that the draft grows after a prompt and the first tokens of its answer, with the full
vocabulary and with the cropped one; nodes that the target accepts are marked, and so are tokens that
the cropped vocabulary does not hold. Beside each tree stands the mask that it is verified under.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from eval.commands.flags import add_out_argument
from eval.methods import side_by_side, stages
from eval.show import plots
from frspec_jax import api, compile_cache
from frspec_jax.api import NO_DRAFT, Draft, Generator, Request
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import TreeConfig
from frspec_jax.drafting import vocab_of
from frspec_jax.errors import UserError
from frspec_jax.tree import accepted_path
from pallas_kernels.visibility import Sees

PLACES = 24  # answer tokens among which a telling tree is looked for
ACCEPTED, OUTSIDE, PLAIN = "#009E73", "#D55E00", "#e8e8e8"


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A draft tree as plain arrays, N nodes, and what the target made of it."""

    title: str
    words: list[str]  # [N] the nodes' tokens
    ids: np.ndarray  # [N]
    parent: np.ndarray  # [N], the root its own
    depth: np.ndarray  # [N]
    mask: np.ndarray  # [N, N] bool: row i may see column j
    accepted: set[int]  # nodes of the accepted path, the root among them
    bonus: str  # the target's own next token after it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--draft", metavar="NAME", help="a draft's name or folder (default: the first that the checkpoint had)"
    )
    parser.add_argument(
        "--draft-vocab",
        metavar="N",
        help="V' of the cropped tree: a number, or a share such as 1/4 (default: as tuned, or a quarter)",
    )
    parser.add_argument("--prompt", default="Why do leaves turn red in autumn?", metavar="TEXT")
    parser.add_argument(
        "--after",
        type=int,
        metavar="N",
        help=f"tokens of the answer before the tree (default: of the first {PLACES}, where most is accepted)",
    )
    parser.add_argument("--tree-size", type=int, default=9, metavar="N", help="nodes with the root (default: 9)")
    parser.add_argument("--depth", type=int, default=3, metavar="D", help="levels below the root (default: 3)")
    parser.add_argument("--draft-top-k", type=int, default=2, metavar="K", help="beams and children (default: 2)")
    add_out_argument(parser, "where the plot goes", required=True)


def run(args: argparse.Namespace) -> None:
    tree = TreeConfig(args.tree_size, args.depth, args.draft_top_k)
    if args.after is not None and args.after < 0:
        raise UserError(f"--after {args.after} must be 0 or more")
    compile_cache.enable()
    checkpoint = Checkpoint.open(args.ckpt)
    if args.draft_vocab not in (None, "full"):
        vocab_of(args.draft_vocab, checkpoint.config.vocab_size)
    if checkpoint.draft_folder(args.draft) is None:
        raise UserError(f"{args.ckpt} holds no draft to draw; add one with python -m train eagle or convert eagle")
    vanilla = api.load(checkpoint, NO_DRAFT)
    full, cropped = (
        api.load(checkpoint, Draft(args.draft, size, tree), target=vanilla.weights.target)
        for size in ("full", args.draft_vocab)
    )
    prompt = vanilla.encode(args.prompt)
    wanted = PLACES if args.after is None else args.after
    answer = vanilla.generate_ids(prompt, Request(max(1, wanted))).tokens
    places = range(len(answer)) if args.after is None else [min(args.after, len(answer))]
    texts = [np.concatenate([prompt, np.asarray(answer[:place], np.int32)]) for place in places]
    # The first of the best: a short text is read more easily than a long one.
    text = max(texts, key=lambda ids: len(grown(full, ids).accepted)) if len(texts) > 1 else texts[0]
    trees = [grown(model, text) for model in (full, cropped)]
    told = vanilla.checkpoint.tokenizer.decode(text[len(prompt) :].tolist())
    inside = set(side_by_side.draft_ids(cropped).tolist())
    name = checkpoint.path.resolve().name
    plots.save(drawing(trees, inside, f"{name}: {args.prompt} … {told}"), args.out, "draft_tree")
    for one in trees:
        path = " ".join(repr(one.words[node]) for node in sorted(one.accepted, key=lambda n: one.depth[n]))
        print(f"{one.title}: accepted {path}, then the target's own {one.bonus!r}")


# One program each, and not one for each of their operations.
_accepted, _mask = jax.jit(accepted_path, static_argnums=2), jax.jit(Sees.dense, static_argnums=1)


def grown(model: Generator, text: np.ndarray) -> Drawn:
    """The tree that a model drafts after a text [T], and the path that the target accepts."""
    with model.begin(text, Request(model.tree.depth + 2)) as after:
        tree, after.state = stages.draft_step(after.plan, model.weights, after.state)
        verdict, after.state = stages.verify_step(after.plan, model.weights, after.state, tree)
        path, drafts = _accepted(tree, verdict.chosen, model.tree.depth)
    mask = np.asarray(_mask(Sees(jnp.int32(0), tree.ancestors), len(tree.tokens)))
    accepted = np.asarray(path)[: int(drafts) + 1].tolist()
    decode = model.checkpoint.tokenizer.decode
    return Drawn(
        title=f"{side_by_side.label(model)}, V' = {model.draft_vocab:,}",
        words=[decode([token]) for token in np.asarray(tree.tokens).tolist()],
        ids=np.asarray(tree.tokens),
        parent=np.asarray(tree.parent),
        depth=np.asarray(tree.depth),
        mask=mask,
        accepted=set(accepted),
        bonus=decode([int(verdict.chosen[accepted[-1]])]),
    )


def heights(parent: np.ndarray) -> np.ndarray:
    """Where each node [N] stands across the tree: leaves side by side, a parent in the middle of its children."""
    children: dict[int, list[int]] = {node: [] for node in range(len(parent))}
    for node in range(1, len(parent)):
        children[int(parent[node])].append(node)
    places = np.zeros(len(parent))
    taken = 0

    def place(node: int) -> float:
        nonlocal taken
        if children[node]:
            places[node] = np.mean([place(child) for child in children[node]])
        else:
            places[node] = taken
            taken += 1
        return float(places[node])

    place(0)
    return places


def drawing(trees: list[Drawn], inside: set[int], title: str) -> Figure:
    """Each tree with its mask beside it, one row a tree."""
    most = max(len(one.words) for one in trees)
    drawn = Figure(figsize=(12, (1.2 + 0.36 * most) * len(trees)), layout="constrained")
    axes: Any = drawn.subplots(len(trees), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), one in zip(axes, trees, strict=True):
        _draw_tree(left, one, inside)
        _draw_mask(right, one)
    legend = {"accepted": ACCEPTED, "outside the cropped V'": OUTSIDE, "rejected": PLAIN}
    drawn.legend(
        handles=[Patch(color=c, label=name) for name, c in legend.items()], loc="outside lower center", ncols=3
    )
    drawn.suptitle(plots.plain(_short(title, 110)), fontsize="medium")
    return drawn


def _draw_tree(axis: Axes, one: Drawn, inside: set[int]) -> None:
    places = heights(one.parent)
    for node in range(1, len(one.words)):
        above = int(one.parent[node])
        kept = node in one.accepted
        axis.plot(
            [one.depth[above], one.depth[node]],
            [places[above], places[node]],
            color=ACCEPTED if kept else "#b0b0b0",
            linewidth=2.5 if kept else 1,
            zorder=1,
        )
    for node, word in enumerate(one.words):
        colour = ACCEPTED if node in one.accepted else PLAIN if int(one.ids[node]) in inside else OUTSIDE
        axis.text(
            one.depth[node],
            places[node],
            f"{node} {_short(word, 14)!r}",
            ha="center",
            va="center",
            fontsize="small",
            parse_math=False,
            color="black" if colour == PLAIN else "white",
            bbox={"boxstyle": "round,pad=0.3", "facecolor": colour, "edgecolor": "none"},
        )
    axis.set_xlim(-0.4, max(one.depth) + 0.4)
    axis.set_ylim(max(places) + 0.7, -0.7)
    axis.set_xticks(range(max(one.depth) + 1), ["root", *(f"depth {d}" for d in range(1, max(one.depth) + 1))])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_title(
        f"{one.title}: {len(one.accepted)} tokens, the bonus {_short(one.bonus, 14)!r} counted",
        fontsize="medium",
        loc="left",
        parse_math=False,
    )


def _draw_mask(axis: Axes, one: Drawn) -> None:
    nodes = len(one.words)
    shade = one.mask.astype(float)
    for node in one.accepted:
        shade[node] *= 2
    axis.imshow(shade, cmap=_colours(), vmin=0, vmax=2)
    names = [f"{node} {_short(word, 10)!r}" for node, word in enumerate(one.words)]
    axis.set_yticks(range(nodes), names, fontsize="x-small", parse_math=False)
    axis.set_xticks(range(nodes), [str(node) for node in range(nodes)], fontsize="x-small")
    axis.set_xticks(np.arange(nodes) - 0.5, minor=True)
    axis.set_yticks(np.arange(nodes) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    axis.set_title("mask: a row sees itself, what is above it, and the whole text before", fontsize="small")


def _colours() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([PLAIN, "#6b7b8c", ACCEPTED])


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
