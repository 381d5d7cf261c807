"""What suits the device at hand, from measurements (docs/kernels.md)."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from frspec_jax.config import TreeConfig
from frspec_jax.pace import Pace
from frspec_jax.prefill import Chunks
from pallas_kernels import device

CONTEXT = 4096  # tokens of prompt and answer, where none are asked for and the model was trained for as many


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What suits a kind of device."""

    tree: TreeConfig  # that each round verifies where the pace is fixed
    paced: TreeConfig  # that a round may verify where it is not: the largest
    pace: Pace
    dtype: Any
    chunks: Chunks  # of a prompt


# What a round with a pace may choose from. As deep as a chain of copied tokens that still pays; the draft's own beams
# seldom do beyond the third level on a CPU. A GPU verifies 60 nodes in about the time of one.
CPU_PACE = Pace((1, 2, 4, 8), TreeConfig(size=2, depth=4, top_k=4))
AMX_PACE = Pace((1, 2, 4, 8, 16), TreeConfig(size=2, depth=4, top_k=4))
GPU_PACE = Pace((1, 60), TreeConfig(size=2, depth=6, top_k=10), ends=False)

DEFAULTS = {
    # A pass over 4, 8 and 60 tokens costs a CPU about 1.5, 1.8 and 5 passes over one in float32; one with units for
    # products of bfloat16 (AMX) about 1.1, 1.2 and 3; and a GPU about one. A GPU needs no longer chunk: from
    # 256 rows on its products take the time, and no longer the bytes of the weights.
    "cpu": Defaults(
        TreeConfig(size=4, depth=2, top_k=2),
        TreeConfig(size=8, depth=7, top_k=4),
        CPU_PACE,
        jnp.float32,
        Chunks(64, 256),
    ),
    "cpu with amx": Defaults(
        TreeConfig(size=8, depth=3, top_k=4),
        TreeConfig(size=16, depth=7, top_k=4),
        AMX_PACE,
        jnp.bfloat16,
        Chunks(64, 256),
    ),
    "gpu": Defaults(
        TreeConfig(size=60, depth=6, top_k=10),
        TreeConfig(size=60, depth=9, top_k=10),
        GPU_PACE,
        jnp.bfloat16,
        Chunks(256),
    ),
}


def defaults(dtype: Any = None) -> Defaults:
    """The defaults of the device at hand, where weights are `dtype`; None: in the dtype that suits it best."""
    if device.current().platform != "cpu":
        return DEFAULTS["gpu"]
    wide = dtype is not None and jnp.dtype(dtype) != jnp.bfloat16
    return DEFAULTS["cpu with amx" if has_amx() and not wide else "cpu"]


@functools.cache
def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in hardware (Intel's Sapphire Rapids and later)."""
    try:
        return " amx_bf16" in cpuinfo.read_text()
    except OSError:
        return False  # not Linux
