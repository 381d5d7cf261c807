"""The sizes of the models that people decode with FR-Spec: what tests lower and benchmarks time."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model by its sizes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied_head: bool = False


SHAPES = {
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "llama3-70b": Shape(80, 8192, 28672, 64, 8, 128, 128256),
    "llama3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied_head=True),
    "llama2-7b": Shape(32, 4096, 11008, 32, 32, 128, 32000),
    "qwen2-7b": Shape(28, 3584, 18944, 28, 4, 128, 152064),
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936, tied_head=True),
    "qwen3-8b": Shape(36, 4096, 12288, 32, 8, 128, 151936),
    "gemma3-1b": Shape(26, 1152, 6912, 4, 1, 256, 262144, tied_head=True),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 64, 49152, tied_head=True),
    "tiny": Shape(2, 64, 96, 4, 2, 32, 500),  # no model: to see that a benchmark runs
}
