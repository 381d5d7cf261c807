"""OUT/report.md: how the steps went, and what was found, out of part1.json and part2.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROUNDS = ("rounds", "more rounds", "4 layers", "4 layers, loops as graphs")  # steps whose figures are rounds
REAL = {"tokens/s": "tokens_per_second", "accepted": "accepted_length", "ms a round": "ms_a_round"}


def written(out: Path) -> str:
    """Write the report of the parts that have run, and return it."""
    lines = ["# GPU check"]
    for part in ("part1", "part2"):
        file = out / f"{part}.json"
        if file.exists():
            lines += _part(part, json.loads(file.read_text()))
    text = "\n".join(lines) + "\n"
    (out / "report.md").write_text(text)
    return text


def _part(name: str, data: dict[str, Any]) -> list[str]:
    figures = data["figures"]
    versions = ", ".join(f"{package} {version}" for package, version in data.get("versions", {}).items())
    lines = ["", f"## {name}", "", f"{data.get('machine', 'no device')}; {data['date']}; `{data['command']}`", versions]
    rows = [[step["step"], step["outcome"], step["seconds"]] for step in data["steps"]]
    lines += _table(("step", "outcome", "seconds"), rows)
    if "gb_per_second" in figures.get("bandwidth", {}):
        lines += ["", f"Bandwidth: {figures['bandwidth']['gb_per_second']:,} GB/s"]
    for step in ROUNDS:
        lines += _rounds(step, figures.get(step, {}))
    lines += _sweep(figures.get("sweep", {}))
    if name == "part1":
        lines += ["", *targets(figures.get("stages", {}).get("stages"))]
    lines += _real(figures.get("real model", {}))
    return lines


def _table(headings: tuple[str, ...], rows: list[list[Any]]) -> list[str]:
    lines = ["", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    return lines + [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]


def _rounds(step: str, found: dict[str, Any]) -> list[str]:
    rows = [
        [name, f"{row['us'] / 1e3:.3f}", f"{row['floor_us'] / 1e3:.3f}", f"{row['times_floor']:.2f}"]
        for name, row in found.items()
        if isinstance(row, dict) and "us" in row
    ]
    failed = [[name, "failed", "", ""] for name, row in found.items() if isinstance(row, dict) and "failed" in row]
    return _table((step, "ms a round", "floor", "× floor"), rows + failed) if rows or failed else []


def _sweep(found: dict[str, Any]) -> list[str]:
    rows = [
        [name, row["xla_us"], row["pallas_us"] or "", row["floor_us"], f"{len(row['wrong'])}/{row['configs']}"]
        for name, row in found.items()
        if isinstance(row, dict) and "xla_us" in row
    ]
    return _table(("kernel, µs", "XLA", "Pallas", "floor", "wrong configs"), rows) if rows else []


def _real(found: dict[str, Any]) -> list[str]:
    rows = [
        [name, *(f"{row[key]:.3f}" for key in REAL.values()), f"{row['same_as_vanilla']}/{row['answers']}"]
        for name, row in found.items()
        if isinstance(row, dict) and "answers" in row
    ]
    return _table(("real model", *REAL, "same as vanilla"), rows) if rows else []


def targets(figures: dict[str, Any] | None) -> list[str]:
    """What the rounds of Llama 3 8B were to reach, beside what was measured by stage: lines of a Markdown table."""
    rows = {row["name"]: row for row in figures["rows"]} if figures else {}
    cropped = next((row for name, row in rows.items() if name.startswith("FR-Spec")), None)
    if cropped is None:
        return ["The rounds by stage were not measured."]
    full, vanilla = rows["EAGLE-2"], rows["vanilla"]

    def ratio(*names: str) -> float:
        chosen = [stage for stage in cropped["stages"] if stage["stage"] in names]
        return sum(stage["us"] for stage in chosen) / sum(stage["floor_us"] for stage in chosen)

    aims = [
        ("verify of 60 nodes, × floor", ratio("verify: layers", "verify: head"), 1.15, False),
        ("a draft level (layer, 32k head, top-k), × floor", ratio("level: layer", "level: head, top-k"), 1.5, False),
        ("round with V' = 32k, × floor", cropped["times_floor"], 1.25, False),
        ("round with V' = 32k, ms", cropped["round_us"] / 1e3, 7.5, False),
        ("vanilla step, × floor", vanilla["times_floor"], 1.10, False),
        ("full-vocabulary round over the 32k round", full["round_us"] / cropped["round_us"], 1.15, True),
    ]
    lines = ["| Llama 3 8B sizes, bfloat16, context 1024 | measured | aim |", "|---|---|---|"]
    for name, value, bar, more in aims:
        outcome = "reached" if (value >= bar) == more or value == bar else "missed"
        lines.append(f"| {name} | {value:.3f} | {'at least' if more else 'at most'} {bar}: {outcome} |")
    return lines
