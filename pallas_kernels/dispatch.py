"""Which implementation of an operation runs: a Pallas kernel on CUDA, the same kernel interpreted, or XLA.

`auto` takes the kernel only where it was measured to beat XLA: on this kind of device, at about this
shape (`measured`; `python -m pallas_kernels.bench --tune` measures). Elsewhere XLA runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp

from pallas_kernels import measured

Implementation = Literal["auto", "pallas", "interpret", "xla"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """An implementation for each operation: a static part of the compiled program."""

    attention: Implementation = "auto"
    head: Implementation = "auto"
    steady: bool = True  # a token's attention rounds alike alone and in a tree (bfloat16 on a CPU; costs time)

    def __post_init__(self) -> None:
        for name in ("attention", "head"):
            if getattr(self, name) not in IMPLEMENTATIONS:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(IMPLEMENTATIONS)}")

    def for_prompts(self) -> Kernels:
        """The same for prompts, whose tokens never run as a tree."""
        return dataclasses.replace(self, steady=False)


AUTO = Kernels()


def choose(
    implementation: Implementation, operation: str, dtype: Any, shape: Mapping[str, int], default: Config
) -> tuple[Implementation, Config]:
    """Resolve `auto`: ("pallas", the measured winner's config), or ("xla", default).

    Args:
      operation: the kernel's name, as its table has it. dtype: of its largest operand. shape: its sizes, by name.
      default: the config that an explicit "pallas" or "interpret" runs with.
    """
    if implementation != "auto":
        return implementation, default
    if jax.default_backend() != "gpu":
        return "xla", default
    row = measured.nearest(jax.devices()[0].device_kind, operation, jnp.dtype(dtype).name, shape, type(default))
    return ("pallas", row.config) if row and row.pallas_us < row.xla_us else ("xla", default)


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least `size` and at least `least`: Triton's sizes."""
    return max(least, 1 << (size - 1).bit_length())


def check_blocks(config: object, *names: str) -> None:
    """Refuse a kernel's config of settings that Triton cannot take.

    Raises:
      ValueError: a setting is not positive, or one of the blocks called `names` is no power of two from 16 on.
    """
    for name, size in vars(config).items():
        if size < 1 or (name in names and size != power_of_two(size)):
            raise ValueError(f"{name} {size} is no {'power of two from 16 on' if name in names else 'positive number'}")
