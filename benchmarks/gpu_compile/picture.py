"""The ledger as a picture: by stage, what the bytes take at the least, and how many launches there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.show import plots

BANDWIDTH = 3.35e12  # bytes a second, the rated figure of an H100's memory: a floor, not a measurement


def draw(entries: list[dict[str, Any]], out: Path) -> None:
    """Write ledger.png and ledger.svg: launches of every program, and the stages of the last round with all kernels."""
    rounds = [entry for entry in entries if entry["case"]["what"] == "round"] or entries
    shown = next((e for e in rounds if e["case"]["kernels"] == "all"), rounds[0])
    figure, (left, middle, right) = plots.figure(width=15.0, height=0.32 * max(len(entries), 16) + 1.2, columns=3)
    plots.bars(left, [e["name"] for e in entries], [e["launches"] for e in entries])
    left.set_title("launches of each program")
    names = [stage["stage"] for stage in shown["stages"]]
    plots.bars(middle, names, [stage["launches"] for stage in shown["stages"]])
    middle.set_title(f"launches by stage\n{plots.plain(shown['name'])}")
    floors = [(stage["read"] + stage["written"]) / BANDWIDTH * 1e6 for stage in shown["stages"]]
    plots.bars(right, names, [round(floor, 1) for floor in floors])
    right.set_title("its bytes at 3.35 TB/s, µs: a floor")
    plots.save(figure, out, "ledger")
