"""Plots of `eval tune`: the figures of a setting varied about the best one, and the trade-off of all settings."""

from __future__ import annotations

import dataclasses

import numpy as np
from matplotlib.figure import Figure

from eval.methods.search import Choice, Point
from eval.show import plots

NAMES = {"draft_vocab": "V'", "size": "tree size", "depth": "depth", "top_k": "top-k"}


def sweeps(best: Choice, points: list[Point], space: dict[str, list[int]], vanilla: float, title: str = "") -> Figure:
    """Tokens/s as each figure of the setting is varied about the best one.

    title: the model and the machine, `plots.heading`.
    """
    drawn, axes = plots.figure(width=12, height=3.4, columns=len(space))
    rates = {p.choice.setting: p.rate for p in points}
    for axis, name in zip(axes, space, strict=True):
        near = sorted({*space[name], getattr(best, name)})
        found = [(value, rates.get(dataclasses.replace(best, **{name: value}).setting)) for value in near]
        measured = [(value, rate) for value, rate in found if rate is not None]
        axis.plot(*zip(*measured, strict=True), marker="o", color=plots.COLOURS[0])
        axis.plot(getattr(best, name), rates[best.setting], marker="*", markersize=14, color=plots.COLOURS[1])
        axis.axhline(vanilla, color="black", linewidth=1, linestyle=":")
        axis.set_xlabel(NAMES[name])
        if name == "draft_vocab":
            axis.set_xscale("log", base=2)
            axis.set_xticks([v for v, _ in measured], [f"{v:,}" for v, _ in measured], rotation=45, fontsize="small")
        else:
            axis.set_xticks([value for value, _ in measured])
        axis.set_ylim(0, None)
    axes[0].set_ylabel("tokens/s (dotted: vanilla)")
    drawn.suptitle(title, fontsize="medium")
    return drawn


def trade_off(best: Choice, points: list[Point], vanilla: float, title: str = "") -> Figure:
    """Every setting by its milliseconds and its tokens a round, over lines of equal tokens/s.

    title: the model and the machine, `plots.heading`.
    """
    drawn, (axis,) = plots.figure(width=7, height=5)
    rates = {p.choice.setting: p.rate for p in points}
    times = np.array([p.round_ms for p in points])
    lengths = np.array([p.accepted_length for p in points])
    x = np.linspace(0.8 * times.min(), 1.1 * times.max(), 2)
    low, high = min(1.0, lengths.min()), 1.08 * lengths.max()
    for rate in np.unique(np.round(np.linspace(0.5 * vanilla, 1.15 * max(rates.values()), 6), 1)):
        axis.plot(x, rate * x / 1e3, color=plots.PAPER, linewidth=0.8)
        top = 1e3 * high / rate  # where the line leaves the axes: above, or else on the right
        end = (top, high) if top < x[1] else (x[1], rate * x[1] / 1e3)
        axis.annotate(f" {rate:.0f}/s", end, fontsize="x-small", color="#707070", annotation_clip=False)
    axis.plot(x, vanilla * x / 1e3, color="black", linewidth=1, linestyle=":", label="as fast as vanilla")
    shades = np.log2([p.choice.draft_vocab for p in points])
    dots = axis.scatter(times, lengths, c=shades, cmap="viridis", s=28, zorder=3)
    star = next(p for p in points if p.choice.setting == best.setting)
    label = f"best: V' {best.draft_vocab:,}, {best.tree.size} nodes, depth {best.depth}, top-k {best.top_k}"
    axis.plot(star.round_ms, star.accepted_length, "*", markersize=16, color=plots.COLOURS[1], label=label, zorder=4)
    axis.set_xlim(*x)
    axis.set_ylim(low, high)
    axis.set_xlabel("milliseconds a round")
    axis.set_ylabel("tokens a round, bonus counted")
    axis.set_title("grey: equal tokens/s", fontsize="small", loc="left", pad=14)
    drawn.suptitle(title, fontsize="medium")
    drawn.colorbar(dots, ax=axis, label="log2 V'", pad=0.08)
    axis.legend(fontsize="small", loc="lower right")
    return drawn
