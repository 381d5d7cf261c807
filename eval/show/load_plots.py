"""Plots of a server under load: percentiles by the rate of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.show.plots import COLOURS, MARKERS, OURS, figure, plain, save

SHOWN = (("first_token", "first token, s"), ("between_tokens", "between tokens, s"))


def by_rate(figures: dict[str, Any], folder: Path) -> str:
    """FOLDER/load.png and .svg: first token, between tokens and tokens a second, by rate; the files' name."""
    rows = figures["rates"]
    names = ["at once" if row["rate"] is None else f"{row['rate']:g}" for row in rows]
    places = list(range(len(rows)))
    shown = [one for one in SHOWN if any(row[one[0]] for row in rows)]  # no panel for what nobody was answered
    drawn, axes = figure(width=11.0 / 3 * (len(shown) + 1), height=3.6, columns=len(shown) + 1)
    for axis, (key, label) in zip(axes, shown, strict=False):
        for colour, marker, percentile in zip(COLOURS, MARKERS, ("p50", "p90", "p99"), strict=False):
            points = [(at, row[key][percentile]) for at, row in zip(places, rows, strict=True) if row[key]]
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, label=percentile) if points else None
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    axes[-1].bar(places, [row["tokens_per_second"] for row in rows], color=OURS, width=0.6)
    axes[-1].set_ylabel("tokens/s, all requests")
    for axis in axes:
        axis.set_xticks(places, names)
        axis.set_xlabel("requests a second")
    drawn.suptitle(f"{plain(figures['model'])}: {figures['prompts']} requests a rate", fontsize=10)
    return save(drawn, folder, "load")
