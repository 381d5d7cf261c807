"""The ledger as a picture: by stage, what the bytes take at the least, and how many launches there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from eval.show import plots

BANDWIDTH = 3.35e12  # bytes a second, the rated figure of an H100's memory: a floor, not a measurement


def draw(entries: list[dict[str, Any]], out: Path) -> None:
    """Write ledger.png and ledger.svg: launches of every program, and a round with all kernels by stage."""
    rounds = [entry for entry in entries if entry["case"]["what"] == "round"] or entries
    shown = next((e for e in rounds if e["case"]["kernels"] == "all"), rounds[0])
    stages, title = shown["stages"], plots.plain(shown["name"])
    names = [stage["stage"] for stage in stages]
    floors = [(stage["read"] + stage["written"]) / BANDWIDTH * 1e6 for stage in stages]
    figure, (left, middle, right) = plots.figure(width=16.0, height=0.34 * max(len(entries), 16) + 1.2, columns=3)
    _bars(left, [e["name"] for e in entries], [e["launches"] for e in entries], "launches of each program")
    _bars(middle, names, [stage["launches"] for stage in stages], f"launches by stage\n{title}")
    _bars(right, names, floors, "bytes by stage at 3.35 TB/s, µs:\na floor, not a measurement")
    plots.save(figure, out, "ledger")


def _bars(axis: Axes, names: Sequence[str], values: Sequence[float], title: str) -> None:
    """Horizontal bars, the first on top, each with its figure behind it."""
    drawn = axis.barh(names, values, color=plots.COLOURS[0], height=0.65)
    axis.bar_label(drawn, [f"{value:,.0f}" for value in values], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.18)
    axis.set_title(title, fontsize=10)
