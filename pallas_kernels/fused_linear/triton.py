"""The product of a few rows with its surroundings as one Pallas kernel for CUDA (Triton).

Each program reads a block of the weight's rows once, along all of its columns, and multiplies it with all rows of x:
the weight is the long side of the product and the few rows the short one, as tensor cores like it. The norm costs no
pass of its own: its scale is one number a row of x, so the squares are added up on the way and the sum is scaled at the
end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dispatch import check_blocks, power_of_two
from pallas_kernels.fused_linear.xla import Gate, Norm
from pallas_kernels.products import precision_of

MOST_ROWS = 64
PROGRAMS = 132  # multiprocessors of an H100


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel divides its work. block_o: outputs a program. block_i: inputs a step."""

    block_o: int = 32
    block_i: int = 128
    num_warps: int = 4
    num_stages: int = 4

    def __post_init__(self) -> None:
        check_blocks(self, "block_o", "block_i")

    @classmethod
    def suited_to(cls, outputs: int, inputs: int) -> Config:
        """A config before anything is measured: large blocks, while there are enough of them to fill the device."""
        block_i = next(block for block in (128, 64, 32, 16) if inputs % block == 0 or block == 16)
        return cls(block_o=next((b for b in (64, 32) if outputs // b >= PROGRAMS), 16), block_i=block_i)


@functools.partial(jax.jit, static_argnames=("gate", "config", "interpret"))  # equal layers are lowered once
def fused_linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    norm: Norm | None,
    gate: Gate | None,
    residual: Array | None,
    *,
    config: Config,
    interpret: bool,
) -> Array:
    """`pallas_kernels.fused_linear.fused_linear`, by the kernel; arguments and result as there."""
    beside = {"bias": bias, "norm": None if norm is None else norm.weight, "residual": residual}
    given = {name: array for name, array in beside.items() if array is not None}
    out = weight.shape[0] // (2 if gate else 1)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            names=tuple(given),
            config=config,
            gate=gate,
            eps=0.0 if norm is None else norm.eps,
            offset=0.0 if norm is None else norm.offset,
        ),
        grid=(-(-out // config.block_o),),
        in_specs=[whole] * (2 + len(given)),
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], out), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="fused_linear",
    )(x, weight, *given.values())


def _kernel(
    x_ref: Any,
    weight_ref: Any,
    *refs: Any,
    names: tuple[str, ...],
    config: Config,
    gate: Gate | None,
    eps: float,
    offset: float,
) -> None:
    """One block of outputs for all rows.

    Refs: x [T, in], weight [out or 2 out, in], what `names` tell, out [T, out].
    """
    beside, out_ref = dict(zip(names, refs[:-1], strict=True)), refs[-1]
    (count, inputs), outputs = x_ref.shape, out_ref.shape[1]
    block_o, block_i, columns = config.block_o, config.block_i, power_of_two(count)
    start = pl.program_id(0) * block_o
    row, line = start + lax.iota(jnp.int32, block_o), lax.iota(jnp.int32, columns)
    precision = precision_of(x_ref)
    ragged = outputs % block_o != 0 or inputs % block_i != 0
    halves = 2 if gate else 1

    def step(carry: Any, _: None) -> tuple[Any, None]:
        number, squares, totals = carry
        first = number * block_i
        column = first + lax.iota(jnp.int32, block_i)
        inside = (line < count)[:, None] & (column < inputs)[None]
        at = (jnp.broadcast_to(a, inside.shape) for a in (line[:, None], column[None]))
        x = plt.load(x_ref.at[*at], mask=inside, other=0)
        if "norm" in beside:
            wide = x.astype(jnp.float32)
            squares += (wide * wide).sum(1)
            scale = plt.load(beside["norm"].at[column], mask=column < inputs, other=0).astype(jnp.float32) + offset
            x = (wide * scale[None]).astype(x.dtype)
        added = []
        for half, total in enumerate(totals):
            tile = weight_ref.at[pl.ds(half * outputs + start, block_o), pl.ds(first, block_i)]
            real = (row < outputs)[:, None] & (column < inputs)[None]
            weight = plt.load(tile, mask=real, other=0) if ragged else plt.load(tile)
            added.append(
                total
                + lax.dot_general(
                    weight, x, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
                )
            )
        return (number + 1, squares, tuple(added)), None

    zero = jnp.zeros((block_o, columns), jnp.float32)
    begin: Any = (np.int32(0), jnp.zeros((columns,), jnp.float32), (zero,) * halves)
    # Counted here, in 32 bits: a fori_loop of a known length counts in as many as JAX is set to.
    (_, squares, totals), _ = lax.scan(step, begin, length=-(-inputs // block_i))

    def finished(total: Array, half: int) -> Array:
        if "norm" in beside:
            total = total * lax.rsqrt(squares / inputs + eps)[None]
        if "bias" in beside:
            bias = plt.load(beside["bias"].at[half * outputs + row], mask=row < outputs, other=0)
            total = total + bias.astype(jnp.float32)[:, None]
        return total

    y = finished(totals[0], 0)
    if gate is not None:
        # GELU by tanh is y sigmoid(2 z), since (1 + tanh z) / 2 is sigmoid(2 z).
        steep = y if gate == "silu" else 2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y)
        y = y * jax.nn.sigmoid(steep) * finished(totals[1], 1)
    mine = (row < outputs)[:, None] & (line < count)[None]
    at = tuple(jnp.broadcast_to(a, mine.shape) for a in (line[None], row[:, None]))
    if "residual" in beside:
        y = y + plt.load(beside["residual"].at[*at], mask=mine, other=0).astype(jnp.float32)
    plt.store(out_ref.at[*at], y.astype(out_ref.dtype), mask=mine)
