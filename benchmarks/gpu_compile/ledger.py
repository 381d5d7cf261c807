"""The ledger of one compiled program: launches and bytes by stage, and what the host has to wait for."""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_compile.hlo import Launch, Loop, Program
from benchmarks.gpu_compile.programs import Compiled

# A stage is the first of these that stands in a launch's scopes. Layers are counted together, levels apart.
STAGES = (
    ("extend", r"/extend\b"),
    ("draft level {}", r"/draft_level_(\d+)\b"),
    ("re-rank", r"/rerank\b"),
    ("verify layers", r"/verify/layer_\d+\b"),
    ("layers", r"/layer_\d+\b"),
    ("head and choice", r"/verify/lm_head\b|/choose\b"),
    ("accept", r"/accept\b"),
    ("compaction", r"/compact\b"),
    ("verify: the rest", r"/verify\b"),
    ("draft: the rest", r"/draft\b"),
)
OTHER = "the rest"  # counters, the output, and what XLA leaves without a name
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


def stage_of(path: str) -> str:
    """The stage of a launch, by the scopes in which the program wrote it."""
    for name, pattern in STAGES:
        if found := re.search(pattern, path):
            return name.format(*found.groups())
    return OTHER


def ledger(done: Compiled, layers: int) -> dict[str, Any]:
    """What a program launches: of a round of decoding, or of all of it where it has no rounds."""
    program = Program(done.text)
    block = program.block(program.entry if done.loop is None else program.decode_loops()[done.loop])
    stages: dict[str, list[Launch]] = collections.defaultdict(list)
    for launch in block.launches:
        stages[stage_of(launch.path)].append(launch)
    caches = set(re.findall(r"\bbf16\[\d+,\d{3,},\d+\]", " ".join(_parameters(program))))
    return {
        "launches": len(block.launches),
        "launches_a_layer": round(len(stages["verify layers"] or stages["layers"]) / layers, 2),
        "loops": [_loop(loop) for loop in block.loops],
        "waits": sum(loop.waits for loop in block.loops),
        "cache_copies": sum(launch.what == "copy" and _shape(launch) in caches for launch in block.launches),
        "read": sum(launch.read for launch in block.launches),
        "written": sum(launch.written for launch in block.launches),
        "temporaries": done.temporaries,
        "held": done.held,
        "collectives": [_collective(name, each) for name in stages if (each := _crossing(stages[name]))],
        "stages": [_stage(name, stages[name]) for name in sorted(stages, key=_order) if stages[name]],
    }


def over_budget(entry: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """In which points a program is over its budget, a sentence each."""
    stages = {stage["stage"]: stage["launches"] for stage in entry["stages"]}
    levels = [count for name, count in stages.items() if re.fullmatch(r"draft level [1-9]\d*", name)]
    points = (
        ("launches", entry["launches"], budget["launches"]),
        ("waits of the host inside a round", entry["waits"], budget["waits"]),
        ("loops inside a round", len(entry["loops"]), budget.get("loops", 0)),
        ("launches in all of these loops", sum(loop["launches"] for loop in entry["loops"]), budget.get("in_loops", 0)),
        ("launches of a draft level", max(levels, default=0), budget.get("level", 99)),
        ("launches of compaction", stages.get("compaction", 0), budget.get("compaction", 4)),
        ("copies of a cache", entry["cache_copies"], 0),
        ("MiB of temporaries", round(entry["temporaries"] / 2**20), budget.get("temporaries", 64)),
        ("collectives", sum(crossing["count"] for crossing in entry["collectives"]), budget.get("collectives", 0)),
        ("GiB a device", round((entry["held"] + entry["temporaries"]) / 2**30, 1), budget.get("device", 80)),
        ("bytes spilled", sum(kernel["spilled"] for kernel in entry["kernels"]), 0),
    )
    return [f"{entry['name']}: {value} {what}, {most} allowed" for what, value, most in points if value > most]


def _parameters(program: Program) -> list[str]:
    return [i.type for i in program.computations[program.entry] if i.operation == "parameter"]


def _shape(launch: Launch) -> str:
    return launch.shape.partition("{")[0]


def _order(name: str) -> tuple[int, str]:
    """The order in which a round runs."""
    names = [stage.partition("{")[0].strip() for stage, _ in STAGES]
    return next((at for at, known in enumerate(names) if name.startswith(known)), len(names)), name


def _loop(loop: Loop) -> dict[str, Any]:
    return {"kind": loop.kind, "stage": stage_of(loop.path), "launches": len(loop.inside), "waits": loop.waits}


def _crossing(launches: Sequence[Launch]) -> list[Launch]:
    """Those in which devices exchange something."""
    return [launch for launch in launches if launch.what in COLLECTIVES]


def _collective(stage: str, launches: Sequence[Launch]) -> dict[str, Any]:
    """What crosses devices in a stage; bytes are of one device's results."""
    of = dict(collections.Counter(launch.what for launch in launches))
    return {"stage": stage, "count": len(launches), "of": of, "bytes": sum(launch.written for launch in launches)}


def _stage(name: str, launches: Sequence[Launch]) -> dict[str, Any]:
    return {
        "stage": name,
        "launches": len(launches),
        "of": dict(collections.Counter(launch.what for launch in launches).most_common()),
        "read": sum(launch.read for launch in launches),
        "written": sum(launch.written for launch in launches),
    }
