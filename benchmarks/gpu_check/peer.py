"""Products by PyTorch, that is cuBLAS, at the shapes of a layer: the bar for ours."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu_check.programs import bandwidth_of, sizes_of
from benchmarks.gpu_check.runner import Session

ROWS = (1, 10, 16, 60, 64)
HELD = 400 * 2**20  # bytes of copies of a weight, so that none is read from the chip's cache


def products(session: Session) -> None:
    """Microseconds of x W^T as it stands in a layer and in the heads, in a CUDA graph."""
    if importlib.util.find_spec("torch") is None or session.dry:
        session.tell("left out", "there is no PyTorch here" if not session.dry else "a dry run has no CUDA")
        return
    import torch

    shape, speed = sizes_of(session).shape, bandwidth_of(session)
    heads, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = {
        "qkv": (heads + 2 * kv, shape.hidden),
        "output": (shape.hidden, heads),
        "gate and up": (2 * shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
        "head of V'": (sizes_of(session).draft_vocab, shape.hidden),
        "head": (shape.vocabulary, shape.hidden),
        "the draft's fc": (shape.hidden, 2 * shape.hidden),
    }
    for name, (outputs, inputs) in weights.items():
        size = 2 * outputs * inputs
        copies = max(1, HELD // size)
        held = [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
        found = {"floor_us": round(1e6 * size / speed, 1)}
        for rows in ROWS:
            x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
            found[f"{rows} rows"] = round(
                _microseconds(torch, lambda w, x=x: torch.nn.functional.linear(x, w), held), 1
            )
        session.tell(name, found)


def _microseconds(torch: Any, call: Callable[[Any], Any], held: list[Any], repeats: int = 5) -> float:
    """Of a call: the median of some replays of a graph that calls on each of `held`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # cuBLAS makes its workspace before anything is captured
        call(held[0])
    torch.cuda.current_stream().wait_stream(side)
    graph, calls = torch.cuda.CUDAGraph(), 4 * len(held)
    with torch.cuda.graph(graph):
        for weight in 4 * held:
            call(weight)
    graph.replay()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(times) / calls
