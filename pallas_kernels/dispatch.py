"""Which implementation of an operation runs: a Pallas kernel on CUDA, the same kernel interpreted, or XLA.

`auto` takes what was measured to win on this kind of device, at about this shape (`measured`; `python -m
pallas_kernels.bench --tune` measures). Unmeasured, attention and what stands around it run as kernels on every GPU that
can run them, since XLA's own attention is many launches; all else is XLA's.

The kernels are Triton's. Attention has one in Mosaic GPU too: a table's row names it where it was measured to win, and
`mosaic` asks for it, and for Triton's where there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import device, measured

Implementation = Literal["auto", "pallas", "mosaic", "interpret", "xla"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """An implementation for each operation: a static part of the compiled program."""

    attention: Implementation = "auto"  # over the cache and the tree, and what writes and moves the cache's rows
    head: Implementation = "auto"  # the draft's, with its log-sum-exp and top-k
    product: Implementation = "auto"  # of a few rows with a layer's weight, with norm, gate and residual
    rows: int | None = None  # XLA's attention on a GPU looks at so many rows of a cache; None: at all of them
    steady: bool = True  # a token's attention rounds alike alone and in a tree (bfloat16 on a CPU; costs time)
    axis: str | None = None  # of a mesh, over whose devices the layers are divided; None: they are on each device

    def __post_init__(self) -> None:
        for name in ("attention", "head", "product"):
            if getattr(self, name) not in IMPLEMENTATIONS:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(IMPLEMENTATIONS)}")

    @classmethod
    def all(cls, implementation: Implementation) -> Kernels:
        """One implementation for every operation."""
        return cls(implementation, implementation, implementation)

    def for_prompts(self) -> Kernels:
        """The same for prompts, whose tokens never run as a tree."""
        return dataclasses.replace(self, steady=False)


AUTO = Kernels()


def resolve(implementation: Implementation) -> Implementation:
    """Resolve for an operation that has nothing to choose: `auto` is the kernel wherever it can run."""
    if implementation == "auto":
        return "pallas" if device.current().runs_triton else "xla"
    return "pallas" if implementation == "mosaic" else implementation


def choose(
    implementation: Implementation,
    operation: str,
    dtype: Any,
    shape: Mapping[str, int],
    default: Config,
    *,
    unmeasured: Implementation = "xla",
    kinds: tuple[type, ...] = (),
) -> tuple[Implementation, Config]:
    """Resolve `auto`: ("pallas", a config) or ("xla", default), whichever was measured to win at about this shape.

    Args:
      operation: the kernel's name, as its table has it. dtype: of its largest operand. shape: its sizes, by name.
      default: the config that an explicit "pallas" or "interpret" runs with, and a kernel that was not measured.
      unmeasured: what runs on a GPU that can run the kernel where no table knows the shape.
      kinds: the classes of its kernels' configs, where it has several kernels. The class of a config says whose it is.
    """
    if implementation != "auto":
        return resolve(implementation), default
    here = device.current()
    if not here.runs_triton:
        return "xla", default
    row = measured.nearest(here.kind, operation, jnp.dtype(dtype).name, shape, *(kinds or (type(default),)))
    if row is None:
        return unmeasured, default
    return ("pallas", row.config) if row.pallas_us < row.xla_us else ("xla", default)


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least `size` and at least `least`: Triton's sizes."""
    return max(least, 1 << (size - 1).bit_length())


def divided(number: Array, by: int) -> tuple[Array, Array]:
    """Quotient and remainder of int32 numbers from 0 on: 32 bits in a kernel under any setting of JAX, as // is not."""
    divisor = jnp.full_like(number, by)
    return lax.div(number, divisor), lax.rem(number, divisor)


def check_blocks(config: object, *names: str) -> None:
    """Refuse a kernel's config of settings that Triton cannot take.

    Raises:
      ValueError: a setting is not positive, or one of the blocks called `names` is no power of two from 16 on.
    """
    check_positive(config)
    for name in names:
        if (size := getattr(config, name)) != power_of_two(size):
            raise ValueError(f"{name} {size} is no power of two from 16 on")


def check_positive(config: object) -> None:
    """Refuse a kernel's config with a setting that is less than 1.

    Raises:
      ValueError: names it.
    """
    for name, size in vars(config).items():
        if size < 1:
            raise ValueError(f"{name} {size} is no positive number")
