"""Plots over runs: tokens/s by method, accepted length by V', acceptance by depth. Each one a PNG and an SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.show.tables import Row, curves, our_rows, paper_rows
from eval.show.tallies import Run, acceptance_by_depth, mean_rate, speed_ups
from frspec_jax.errors import UserError

# Okabe and Ito's colours, told apart by colour-blind readers too; grey is the paper's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PAPER = "#9a9a9a"
OURS, OTHER, PLAIN = "#009E73", "#5b6770", "#9a9a9a"  # of bars: FR-Spec, other drafts, and decoding without any
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


def heading(model: str, machine: str) -> str:
    """What a picture's title says first: which model was measured, on which machine (`provenance.machine`)."""
    return plain(f"{model} on {machine.removeprefix('CPU: ')}")


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


def hue(method: str) -> str:
    """The colour of a method's bar, by its name in tables: FR-Spec stands out."""
    known = method.startswith(("vanilla", "transformers"))
    return PLAIN if known else OURS if method.startswith("FR-Spec") or "+ FR" in method else OTHER


def bars(axis: Axes, names: Sequence[str], values: Sequence[float], errors: Any = None, digits: int = 1) -> None:
    """Horizontal bars, the first on top, each with its figure inside and in the colour of its method."""
    places = np.arange(len(names))
    colours = [hue(name) for name in names]
    axis.barh(places, values, xerr=errors, color=colours, height=0.65, error_kw={"elinewidth": 1, "capsize": 3})
    for place, value in enumerate(values):
        axis.annotate(f" {value:,.{digits}f}", (0, place), va="center", ha="left", color="white", fontweight="bold")
    axis.set_yticks(places, [plain(name) for name in names])
    for label, name in zip(axis.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if hue(name) == OURS else "normal")
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")


def titled(run: Run) -> str:
    """What a figure shows: the model, the machine, and the run where it has a name of its own."""
    of = "" if run.name == run.model else f" ({run.name})"
    return heading(run.model, run.manifest["machine"]) + plain(f", {run.manifest['dtype']}{of}")


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
    return rates(titled(run), list(run.methods), values, (low, high), vanilla)


def rates(title: str, names: list[str], values: list[float], errors: Any, vanilla: float) -> Figure:
    """A bar of tokens/s for each method, with its whiskers, against vanilla's."""
    drawn, (axis,) = figure(height=1.2 + 0.45 * len(values))
    bars(axis, names, values, errors=errors)
    axis.axvline(vanilla, color="black", linewidth=1, linestyle=":")
    axis.set_xlabel("tokens/s of decoding, mean over tasks (dotted: vanilla)\nwhiskers: 95 % interval of the speed-up")
    axis.set_title(title, fontsize="medium", loc="left")
    return drawn


def accepted_by_vocabulary(runs: Sequence[Run]) -> Figure:
    """Accepted length against V' / V, and as a share of the full vocabulary's: our runs, and the paper's models."""
    ours = {
        f"{run.name}, {name}" if len(runs) > 1 else name: rows
        for run in runs
        for name, rows in curves(our_rows(run, run.drafting, lambda part: part.accepted_length)).items()
    }
    return kept(" and ".join(dict.fromkeys(titled(run) for run in runs)), ours)


def kept(title: str, ours: Mapping[str, list[Row]]) -> Figure:
    """The two panels of `accepted_by_vocabulary`, for curves of ours beside the paper's."""
    theirs = curves(paper_rows("accepted_length", 0))
    drawn, (length, share) = figure(width=10.5, height=5.6, columns=2)
    for number, (name, rows) in enumerate([*theirs.items(), *ours.items()]):
        sizes, averages = [row.size for row in rows], [row.average for row in rows]
        mine = number >= len(theirs)
        own = number - len(theirs)
        style: dict[str, Any] = {
            "color": COLOURS[own % len(COLOURS)] if mine else PAPER,
            "marker": MARKERS[number % len(MARKERS)],
            "markersize": 7 if mine else 4,
            "linewidth": 2.5 if mine else 1,
            "linestyle": "-" if mine else "--",
            "label": plain(name),
        }
        length.plot(sizes, averages, **style)
        share.plot(sizes, 100 * np.divide(averages, max(averages)), **style)
    for axis, text in (
        (length, "accepted length, bonus counted"),
        (share, "% of the full vocabulary's accepted length"),
    ):
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16], ["full", "1/2", "1/4", "1/8", "1/16"])
        axis.minorticks_off()
        axis.invert_xaxis()
        axis.set_xlabel("V' / V, the share of the vocabulary that the draft keeps")
        axis.set_ylabel(text)
    length.set_ylim(1, None)
    drawn.suptitle(f"ours: {title}; dashed: the paper's", fontsize="medium")
    handles, labels = share.get_legend_handles_labels()
    order = [*range(len(theirs), len(labels)), *range(len(theirs))]  # ours first
    shown = [handles[n] for n in order], [labels[n] for n in order]
    drawn.legend(*shown, loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    return drawn


def acceptance(run: Run) -> Figure:
    """Acceptance by depth of the tree, one line a method."""
    rows = our_rows(run, run.drafting, lambda part: part.accepted_length)
    lines = [(row, acceptance_by_depth(run.whole(row.label).histogram)) for row in rows]
    return depths(titled(run), lines)


def depths(title: str, lines: Sequence[tuple[Row, Sequence[float]]]) -> Figure:
    """A line a method: whole vocabularies in grey, cropped ones the lighter the fewer tokens they keep.

    Rankings are told apart by marker and dash, so that nine methods are nine lines.
    """
    drawn, (axis,) = figure(width=8.5)
    families = list(dict.fromkeys(row.family for row, _ in lines))
    corpora = list(dict.fromkeys(row.corpus for row, _ in lines))
    for row, shares in lines:
        fade = min(1.0, math.log2(1 / row.size) / 5)  # 0 for the whole vocabulary, 4/5 for a sixteenth
        base = COLOURS[(2 + families.index(row.family)) % len(COLOURS)]
        colour = OTHER if row.size == 1 else tuple(c + (1 - c) * (fade - 0.2) for c in to_rgb(base))
        which = corpora.index(row.corpus)
        axis.plot(
            range(1, len(shares) + 1),
            [100 * share for share in shares],
            label=plain(row.label),
            color=colour,
            marker=MARKERS[(which + len(corpora) * families.index(row.family)) % len(MARKERS)],
            linestyle=("-", "--", ":", "-.")[which % 4],
            linewidth=2,
        )
    axis.set_ylim(85 * min((share for _, shares in lines for share in shares), default=0), None)  # lines lie close
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("depth in the draft tree")
    axis.set_ylabel("% accepted, of the rounds that got there")
    axis.set_title(title, fontsize="medium", loc="left")
    drawn.legend(loc="outside right upper", fontsize="small", frameon=False)
    return drawn
