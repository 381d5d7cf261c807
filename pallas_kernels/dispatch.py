"""Which implementation of an operation runs: a Pallas kernel on CUDA, the same kernel interpreted, or XLA.

`auto` takes the kernel only where it was measured to beat XLA: on this kind of device, at about this
shape (`tuned.json`, written by `python -m pallas_kernels.bench --tune`). Elsewhere XLA runs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import jax

Implementation = Literal["auto", "pallas", "interpret", "xla"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
TUNED = Path(__file__).with_name("tuned.json")

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
    implementation: Implementation, operation: str, shape: dict[str, int], default: Config
) -> tuple[Implementation, Config]:
    """Resolve `auto`: ("pallas", the measured winner's config), or ("xla", default).

    Args:
      operation: the kernel's name and dtype, as the table has them. shape: its sizes, by name.
      default: the config that an explicit "pallas" or "interpret" runs with.
    """
    if implementation != "auto":
        return implementation, default
    if jax.default_backend() != "gpu":
        return "xla", default
    found = measured(operation, jax.devices()[0].device_kind, shape)
    return ("xla", default) if found is None else ("pallas", dataclasses.replace(default, **found))  # type: ignore[type-var]


def measured(operation: str, device: str, shape: dict[str, int], table: Path = TUNED) -> dict[str, Any] | None:
    """The config of the nearest measured shape on this kind of device, if the kernel won there.

    A shape is near if no size is off by more than a factor of two.
    """
    rows = [row for row in _table(table) if (row["operation"], row["device"]) == (operation, device)]
    distances = [max(abs(math.log2(shape[name] / size)) for name, size in row["shape"].items()) for row in rows]
    if not distances or min(distances) > 1:
        return None
    best = rows[distances.index(min(distances))]
    return best["config"] if best["pallas_us"] < best["xla_us"] else None


@functools.cache
def _table(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least `size` and at least `least`: Triton's sizes."""
    return max(least, 1 << (size - 1).bit_length())
