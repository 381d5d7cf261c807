"""How long an operation takes on the device, and the least time that its bytes allow.

The host's clock round one launch says little of a kernel: here many calls run inside one compiled
program, each on its own copy of the data where one copy would stay in the cache of the chip.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

CACHE = 256 * 2**20  # bytes that no chip's cache holds: several times an H100's
Carry = Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape, to be timed: `run(moving, *still, implementation=, config=)`."""

    operation: str  # the kernel's name, as `dispatch.choose` has it
    label: str  # model and sizes, for people
    dtype: str  # of the largest operand
    shape: dict[str, int]  # sizes by name, as `dispatch.choose` has them
    bytes: int  # that it must read
    run: Callable[..., Any]
    moving: Array
    still: tuple[Any, ...]
    configs: tuple[Any, ...]  # what a sweep tries, first the one that would suit
    tolerance: float  # of the kernel's result against the reference in float32


class Loop:
    """A compiled loop of `calls` of one `step(held, carry)`: threads may compile many side by side, and one runs them.

    The step must use what the one before it returned (`nudged`), or XLA would leave it out or run it once.
    held: arrays that are only read. carry: copied, and from then on updated in place.
    """

    def __init__(self, step: Callable[[Any, Carry], Carry], held: Any, carry: Carry, calls: int) -> None:
        @functools.partial(jax.jit, donate_argnums=1)
        def loop(held: Any, carry: Carry) -> Carry:
            return lax.fori_loop(0, calls, lambda _, carry: step(held, carry), carry)

        self._held, self._carry, self._calls = held, carry, calls
        self._run = loop.lower(held, carry).compile()

    def microseconds(self, repeats: int = 5) -> float:
        """Of one step: the median over `repeats` loops, after one that is not counted."""
        carry = jax.block_until_ready(
            self._run(self._held, jax.tree.map(lambda x: jnp.array(x, copy=True), self._carry))
        )
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            carry = jax.block_until_ready(self._run(self._held, carry))
            times.append(time.perf_counter() - start)
        return 1e6 * statistics.median(times) / self._calls


def looped(step: Callable[[Any, Carry], Carry], held: Any, carry: Carry, calls: int, repeats: int = 5) -> float:
    """Median microseconds of one `step(held, carry)`, over `repeats` compiled loops of `calls` of them (`Loop`)."""
    return Loop(step, held, carry, calls).microseconds(repeats)


def nudged(x: Array, by: Array) -> Array:
    """x, changed by next to nothing that depends on all of `by`: so one call has to wait for another."""
    hint = by.astype(jnp.float32).mean()
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x + (hint > 1e30).astype(x.dtype)
    return (x + 1e-30 * hint).astype(x.dtype)


def copies_of(still: tuple[Any, ...], most: int = 16) -> list[tuple[Any, ...]]:
    """So many copies of some arrays that they fit no cache, `most` at most; the first are the arrays themselves."""
    size = sum(array.nbytes for array in jax.tree.leaves(still))
    count = max(1, min(most, CACHE // max(1, size)))
    return [still, *(jax.tree.map(lambda x: jnp.array(x, copy=True), still) for _ in range(count - 1))]


def calls_of(function: Callable[..., Any], moving: Array, copies: list[tuple[Any, ...]], calls: int = 64) -> Loop:
    """A loop of `function(moving, *still)`, out of cache: the arrays of `still` rotate over `copies_of` them.

    The result (the first, where there are several) is folded into `moving`, weighted by almost nothing.
    """

    def step(held: Any, moving: Array) -> Array:
        for still in held:
            moving = nudged(moving, jax.tree.leaves(function(moving, *still))[0])
        return moving

    return Loop(step, copies, moving, max(1, calls // len(copies)))


def bandwidth(megabytes: int = 512) -> float:
    """Bytes a second that this device reads from memory: the best of several matrix-vector products."""
    data = jnp.ones((megabytes * 2**8, 2**10), jnp.float32)
    vector = jnp.ones((2**10,), jnp.float32)
    product = jax.jit(lambda x, y: x @ y)
    jax.block_until_ready(product(data, vector))
    best = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(4):
            out = product(data, vector)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / 4)
    return data.nbytes / best
