"""`python -m docs.tools.round_picture CKPT`: draws docs/round.png and .svg, one round on one real tree.

The tree is what SmolLM2's draft grew in the middle of an answer; the words under its nodes are what the target itself
would say next there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.commands.draft_tree import ACCEPTED, PLAIN, heights
from eval.methods import stages
from eval.show import plots
from frspec_jax import api
from frspec_jax.api import NO_DRAFT, Draft, Request
from frspec_jax.config import TreeConfig

QUESTION, AFTER = "Why is the sky blue?", 29  # tokens of the answer before the tree
TREE = TreeConfig(8, 3, 2)
GREY = "#8a8a8a"


def main(ckpt: str) -> None:
    target = api.load(ckpt, NO_DRAFT)
    model = api.load(ckpt, Draft("eagle", "1/4", TREE), target=target.weights.target)
    prompt = target.encode(QUESTION)
    answer = target.generate_ids(prompt, Request(AFTER)).tokens
    decode = model.checkpoint.tokenizer.decode
    with model.begin(np.concatenate([prompt, np.asarray(answer, np.int32)]), Request(8)) as text:
        tree, text.state = stages.draft_step(text.plan, model.weights, text.state)
        verdict, text.state = stages.verify_step(text.plan, model.weights, text.state, tree)
    words = [decode([token]).strip() for token in np.asarray(tree.tokens).tolist()]
    chosen = [decode([token]).strip() for token in np.asarray(verdict.chosen).tolist()]
    parent, depth = np.asarray(tree.parent), np.asarray(tree.depth)
    path = [0]  # a child is right if it is what the target says after its parent
    while right := [n for n in range(1, len(words)) if parent[n] == path[-1] and words[n] == chosen[path[-1]]]:
        path.append(right[0])
    said = "… " + " ".join(decode(answer).split()[-6:])
    print(words, chosen, path, said, parent.tolist())
    plots.save(drawing(words, chosen, path, parent, depth, said), Path(__file__).parents[1], "round")


def drawing(
    words: list[str], chosen: list[str], path: list[int], parent: np.ndarray, depth: np.ndarray, said: str
) -> Figure:
    """Three panels of one tree: guessed, checked, kept."""
    drawn = Figure(figsize=(10.5, 3.3), layout="constrained")
    axes: Any = drawn.subplots(1, 3)
    guesses = len(words) - 1
    titles = (
        f"1  Draft: {guesses} guesses, a level at a time",
        "2  Verify: in one pass, the target's\nnext word after each",
        f"3  Accept: {len(path)} words from one pass",
    )
    for number, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        _panel(axis, number, words, chosen, path, parent, depth)
        axis.set_title(title, fontsize=12, loc="left")
    kept = " ".join([*(words[node] for node in path), chosen[path[-1]]])
    drawn.suptitle(f"{said}   →   {kept}", fontsize=12, parse_math=False)
    return drawn


def _panel(
    axis: Axes, number: int, words: list[str], chosen: list[str], path: list[int], parent: np.ndarray, depth: np.ndarray
) -> None:
    places = heights(parent)
    for node in range(len(words)):
        kept = number == 2 and node in path
        if node:
            above = int(parent[node])
            ends = [depth[above], depth[node]], [places[above], places[node]]
            axis.plot(*ends, color=ACCEPTED if kept else "#c8c8c8", linewidth=3 if kept else 1.2, zorder=1)
        colour = ACCEPTED if kept else PLAIN if number < 2 or node else ACCEPTED
        ink = "white" if kept else GREY if number == 2 else "black"
        box = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "none"}
        axis.text(
            depth[node], places[node], words[node], ha="center", va="center", fontsize=12, color=ink, bbox=box, zorder=3
        )
        if number == 1:
            right = any(parent[n] == node and words[n] == chosen[node] for n in range(1, len(words)))
            axis.text(
                depth[node],
                places[node] + 0.32,
                f"→ {chosen[node]}",
                ha="center",
                va="center",
                fontsize=11,
                color=ACCEPTED if right or node == path[-1] else GREY,
                fontweight="bold" if right else "normal",
            )
    if number == 2:
        last = path[-1]
        axis.annotate(
            chosen[last],
            (depth[last], places[last]),
            (depth[last] + 0.95, places[last]),
            ha="center",
            va="center",
            fontsize=12,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "black"},
            arrowprops={"arrowstyle": "-", "color": "black", "zorder": 0},
            zorder=0,
        )
    axis.set_xlim(-0.45, max(depth) + 0.55)
    axis.set_ylim(max(places) + 0.7, -0.6)
    axis.axis("off")


if __name__ == "__main__":
    main(sys.argv[1])
