"""What the rows of a draft's head bring: accepted length against how many are read, static and in context."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from eval.show import plots


def kept_by_rows(figures: dict[str, Any], machine: str) -> Figure:
    """The share of the first method's accepted length that each V' keeps, without slots and with them.

    figures: of `python -m eval accept`.
    """
    rows = figures["methods"]
    drawn, (axis,) = plots.figure()
    for number, slots in enumerate(sorted({row["context_slots"] for row in rows})):
        mine = sorted((row["draft_vocab"] + slots, row["average"]) for row in rows if row["context_slots"] == slots)
        axis.plot(
            [read for read, _ in mine],
            [100 * average / rows[0]["average"] for _, average in mine],
            color=plots.COLOURS[number % len(plots.COLOURS)],
            marker=plots.MARKERS[number % len(plots.MARKERS)],
            label=f"V' and {slots:,} slots for ids of the text" if slots else "V' most frequent",
        )
    axis.axhline(99, color="black", linewidth=1, linestyle=":")
    axis.set_xscale("log", base=2)
    ticks = sorted({row["draft_vocab"] for row in rows})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    axis.minorticks_off()
    axis.set_xlabel("rows of the draft's head that a level reads")
    axis.set_ylabel(f"accepted length, % of {plots.plain(rows[0]['name'])}'s")
    axis.legend(fontsize="small")
    title = plots.heading(figures["model"], machine) + f"\n{figures['questions']} questions, greedy"
    axis.set_title(title, fontsize="medium", loc="left")
    return drawn
