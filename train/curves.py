"""`python -m train curves WORK`: a run's loss, agreement and accepted length by step, as a plot.

A run draws the same plot of itself, WORK/curves.png, at every evaluation and when it ends.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from frspec_jax.errors import UserError
from frspec_jax.files import written_aside


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work", nargs="+", type=Path, metavar="WORK", help="folders of runs; several share the axes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .png or .svg file (default: WORK/curves.png)")


def run(args: argparse.Namespace) -> None:
    out = args.out or args.work[0] / "curves.png"
    if out.suffix not in (".png", ".svg"):
        raise UserError(f"--out {out}: give a name that ends in .png or .svg")
    draw(args.work, out)
    print(f"wrote {out}")


def read(work: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, by step: of a resumed run, the last word on each step."""
    file = work / "metrics.jsonl"
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; give the folder of a run (--work)") from None
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut short
        kind = next((name for name in ("held_out", "accepted_length") if name in row), "training")
        rows[row["step"], kind] = row
    return [rows[key] for key in sorted(rows)]


def draw(works: list[Path], out: Path) -> None:
    """Three plots side by side: the training loss, held-out agreement by part, and accepted length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, agreement, accepted) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for work in works:
        rows = read(work)
        label = work.name if len(works) > 1 else None
        trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        if trained:
            loss.plot(*zip(*trained, strict=True), label=label, linewidth=0.8)
        held_out = [(row["step"], row["held_out"]["top1"]) for row in rows if "held_out" in row]
        for part in range(len(held_out[0][1]) if held_out else 0):
            points = [(step, top1[part]) for step, top1 in held_out]
            name = f"{label + ', ' if label else ''}{part + 1}"
            agreement.plot(*zip(*points, strict=True), marker=".", label=name)
        lengths = [(row["step"], row["accepted_length"]) for row in rows if "accepted_length" in row]
        if lengths:
            accepted.plot(*zip(*lengths, strict=True), marker=".", label=label)
    loss.set(xlabel="step", ylabel="loss", title="training loss")
    agreement.set(xlabel="step", ylabel="top-1 agreement with the target", title="held out, by self-fed step or head")
    accepted.set(xlabel="step", ylabel="tokens a round, bonus counted", title="accepted length on held-out prompts")
    for axes in (loss, agreement, accepted):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    figure.suptitle(", ".join(work.resolve().name for work in works), fontsize="medium")
    try:
        with written_aside(out, f"--out {out}", suffix=out.suffix) as part_file:
            figure.savefig(part_file, dpi=110)
    finally:
        pyplot.close(figure)
