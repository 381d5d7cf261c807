"""Plots over runs: tokens/s by method, accepted length by V', acceptance by depth. Each one a PNG and an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.show.tables import curves, our_rows, paper_rows
from eval.show.tallies import Run, acceptance_by_depth, mean_rate, speed_ups
from frspec_jax.errors import UserError

# Okabe and Ito's colours, told apart by colour-blind readers too; grey is the paper's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PAPER = "#9a9a9a"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def figure(width: float = 7.0, height: float = 4.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of `columns` axes side by side."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    axes = drawn.subplots(1, columns, squeeze=False)[0].tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.grid(alpha=0.25)
    return drawn, axes


def plain(name: str) -> str:
    """A name of the user's, to be drawn as it is: matplotlib reads what stands between dollar signs as mathematics."""
    return name.replace("$", r"\$")


def save(drawn: Figure, folder: Path, name: str) -> str:
    """Write FOLDER/name.png and name.svg; the same figure gives the same bytes.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            drawn.savefig(folder / f"{name}.svg", metadata={"Date": None})
            drawn.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}; name another folder") from None
    return name


def bars(axis: Axes, names: Sequence[str], values: Sequence[float], errors: Any = None, digits: int = 1) -> None:
    """Horizontal bars, the first on top, each with its figure inside."""
    places = np.arange(len(names))
    axis.barh(places, values, xerr=errors, color=COLOURS[0], height=0.65, error_kw={"elinewidth": 1, "capsize": 3})
    for place, value in enumerate(values):
        axis.annotate(f" {value:,.{digits}f}", (0, place), va="center", ha="left", color="white", fontweight="bold")
    axis.set_yticks(places, [plain(name) for name in names])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")


def tokens_per_second(run: Run) -> Figure:
    """Decoding tokens/s of every method: the mean over tasks, and the interval of its speed-up over vanilla."""
    base = run.tallies["vanilla"]
    vanilla = mean_rate(base)
    values, low, high = [], [], []
    for name in run.methods:
        value = mean_rate(run.tallies[name])
        up = speed_ups(run.tallies[name], base)["Average"]
        values.append(value)
        low.append(max(0.0, value - up.low * vanilla))
        high.append(max(0.0, up.high * vanilla - value))
    drawn, (axis,) = figure(height=1.2 + 0.45 * len(values))
    bars(axis, list(run.methods), values, errors=(low, high))
    axis.axvline(vanilla, color="black", linewidth=1, linestyle=":")
    axis.set_xlabel("tokens/s of decoding, mean over tasks\nwhiskers: 95 % interval of the speed-up over vanilla")
    axis.set_title(plain(f"{run.name}: {run.model}, {run.manifest['machine']}"), fontsize="medium")
    return drawn


def accepted_by_vocabulary(runs: Sequence[Run]) -> Figure:
    """Accepted length against V' / V, and as a share of the full vocabulary's: our runs, and the paper's models."""
    ours = {
        f"{run.name}, {name}" if len(runs) > 1 else name: rows
        for run in runs
        for name, rows in curves(our_rows(run, run.drafting, lambda part: part.accepted_length)).items()
    }
    lines = [*ours.items(), *curves(paper_rows("accepted_length", 0)).items()]
    drawn, (length, share) = figure(width=10.5, height=4.8, columns=2)
    for number, (name, rows) in enumerate(lines):
        sizes, averages = [row.size for row in rows], [row.average for row in rows]
        mine = number < len(ours)
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)] if mine else PAPER,
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 5,
            "linestyle": "-" if mine else "--",
            "label": plain(name),
        }
        length.plot(sizes, averages, **style)
        share.plot(sizes, np.divide(averages, max(averages)), **style)
    for axis, text in ((length, "accepted length, bonus counted"), (share, "share of the full vocabulary's")):
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16], ["full", "1/2", "1/4", "1/8", "1/16"])
        axis.invert_xaxis()
        axis.set_xlabel("V' / V")
        axis.set_ylabel(text)
    length.set_ylim(1, None)
    share.legend(fontsize="x-small")
    return drawn


def acceptance(run: Run) -> Figure:
    """Acceptance by depth of the tree, one line a method."""
    drawn, (axis,) = figure(width=6)
    for number, name in enumerate(run.drafting):
        shares = acceptance_by_depth(run.whole(name).histogram)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axis.plot(range(1, len(shares) + 1), shares, label=plain(name), color=colour, marker=marker)
    axis.set_ylim(0, None)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("depth in the draft tree")
    axis.set_ylabel("accepted, of the rounds that got there")
    axis.legend(fontsize="small")
    return drawn
