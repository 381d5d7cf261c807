"""Compaction as one Pallas kernel for CUDA (Triton), whatever the number of layers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dispatch import power_of_two

MOST_ARRAYS = 64  # a launch: a kernel's arguments are limited to 4 KiB, and each array is two of them


def moved(arrays: list[Array], start: Array, path: Array, slot: Array | None, *, interpret: bool) -> list[Array]:
    """`xla.in_slots`, by the kernel; no slot: of one sequence, in a pool of one."""
    slot = jnp.zeros(start.shape[0], jnp.int32) if slot is None else slot
    return [
        array
        for first in range(0, len(arrays), MOST_ARRAYS)
        for array in _launch(arrays[first : first + MOST_ARRAYS], start, path, slot, interpret)
    ]


def _launch(arrays: list[Array], start: Array, path: Array, slot: Array, interpret: bool) -> list[Array]:
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_kernel, count=len(arrays), interpret=interpret),
        grid=(arrays[0].shape[1], len(arrays), start.shape[0]),
        in_specs=[whole] * (3 + len(arrays)),
        out_specs=[whole] * len(arrays),
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays],
        input_output_aliases={3 + number: number for number in range(len(arrays))},
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="compact",
    )(start, path, slot, *arrays)


def _kernel(start_ref: Any, path_ref: Any, slot_ref: Any, *refs: Any, count: int, interpret: bool) -> None:
    """One head of one array, of one sequence."""
    head, text, steps, head_dim = pl.program_id(0), pl.program_id(2), path_ref.shape[1] - 1, refs[0].shape[3]
    step, column = (lax.iota(jnp.int32, power_of_two(size, least=1)) for size in (steps, head_dim))
    start = start_ref[text]
    node = plt.load(path_ref.at[jnp.broadcast_to(text, step.shape), step + 1], mask=step < steps, other=0)
    real = (step < steps)[:, None] & (column < head_dim)[None]
    source, target, column = (
        jnp.broadcast_to(a, real.shape) for a in ((start + node)[:, None], (start + 1 + step)[:, None], column[None])
    )
    heads, slots = jnp.broadcast_to(head, real.shape), jnp.broadcast_to(slot_ref[text], real.shape)
    for number, ref in enumerate(refs[count:]):

        @pl.when(pl.program_id(1) == number)
        def _(ref: Any = ref) -> None:
            rows = plt.load(ref.at[slots, heads, source, column], mask=real, other=0)
            if not interpret:
                plt.debug_barrier()  # a row may be both moved from and moved to
            plt.store(ref.at[slots, heads, target, column], rows, mask=real)
