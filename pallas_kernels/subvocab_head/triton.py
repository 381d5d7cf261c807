"""The sub-vocabulary head as a Pallas kernel for CUDA (Triton): product, log-sum-exp and top-k in one pass.

Each program multiplies a tile of the head's rows with all features, and leaves the tile's k best
scores and its log-sum-exp; XLA merges the tiles. The logits are never in memory. The vocabulary is
the long side of the product and the few features the short one, as tensor cores like it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dispatch import check_blocks, power_of_two
from pallas_kernels.products import precision_of

MASKED = -1e30  # the score of rows past the end of the head: below every real one, above what is taken already


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel divides its work. block_v: rows of the head a program. block_h: columns a step."""

    block_v: int = 64
    block_h: int = 128
    num_warps: int = 4
    num_stages: int = 4

    def __post_init__(self) -> None:
        check_blocks(self, "block_v", "block_h")

    @classmethod
    def suited_to(cls, hidden: int) -> Config:
        """A config before anything is measured: steps that divide `hidden` where they can."""
        block = next(block for block in (128, 64, 32, 16) if hidden % block == 0 or block == 16)
        return cls(block_h=block)


def subvocab_top_k(
    x: Array, head: Array, k: int, scale: Array | None, config: Config, interpret: bool
) -> tuple[Array, Array]:
    """`pallas_kernels.subvocab_head.subvocab_top_k`, by the kernel; arguments and result as there."""
    (count, hidden), size = x.shape, head.shape[0]
    columns = power_of_two(count)
    tiles, steps, kept = -(-size // config.block_v), -(-hidden // config.block_h), power_of_two(k, least=1)
    padded = jnp.pad(x, ((0, columns - count), (0, steps * config.block_h - hidden)))
    scales = [] if scale is None else [scale]
    kernel = functools.partial(_kernel, config=config, size=size, hidden=hidden, k=k, kept=kept)
    per_tile = pl.BlockSpec((None, kept, columns), lambda tile: (tile, 0, 0))
    one_row = pl.BlockSpec((None, columns), lambda tile: (tile, 0))
    scores, index, peak, total = pl.pallas_call(
        kernel,
        grid=(tiles,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY) for _ in range(2 + len(scales))],
        out_specs=[per_tile, per_tile, one_row, one_row],
        out_shape=[
            jax.ShapeDtypeStruct((tiles, kept, columns), jnp.float32),
            jax.ShapeDtypeStruct((tiles, kept, columns), jnp.int32),
            jax.ShapeDtypeStruct((tiles, columns), jnp.float32),
            jax.ShapeDtypeStruct((tiles, columns), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="subvocab_head",
    )(padded, head, *scales)
    # Tiles in order, and within a tile the better or the earlier first: a stable top-k keeps ties in order.
    candidates = scores[:, :k].transpose(2, 0, 1).reshape(columns, -1)[:count]
    numbers = index[:, :k].transpose(2, 0, 1).reshape(columns, -1)[:count]
    best, at = lax.top_k(candidates, k)
    log_total = jax.nn.logsumexp(peak + jnp.log(total), axis=0)[:count, None]
    # Two ways of rounding the same sum must not make a certain token more than certain.
    return jnp.minimum(best - log_total, 0.0), jnp.take_along_axis(numbers, at, axis=1)


def _kernel(x_ref: Any, head_ref: Any, *refs: Any, config: Config, size: int, hidden: int, k: int, kept: int) -> None:
    """One tile of the head against all features.

    Refs: x [M, H], padded; head [V', H]; scale [V'] where the head is quantised; then the results:
    scores and index [kept, M], the k first real; peak and total [M], of the softmax over the tile.
    """
    scores_ref, index_ref, peak_ref, total_ref = refs[-4:]
    block_v, block_h, columns = config.block_v, config.block_h, x_ref.shape[0]
    start = pl.program_id(0) * block_v
    row = start + lax.iota(jnp.int32, block_v)
    precision = precision_of(x_ref)
    ragged = size % block_v != 0 or hidden % block_h != 0

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        number, total = carry
        column = number * block_h + lax.iota(jnp.int32, block_h)
        tile = head_ref.at[pl.ds(start, block_v), pl.ds(number * block_h, block_h)]
        real = (row < size)[:, None] & (column < hidden)[None]
        weight = plt.load(tile, mask=real, other=0) if ragged else plt.load(tile)
        x = x_ref[:, pl.ds(number * block_h, block_h)]
        product = lax.dot_general(
            weight.astype(x.dtype),
            x,
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return (number + 1, total + product), None

    begin: tuple[Any, Array] = np.int32(0), jnp.zeros((block_v, columns), jnp.float32)
    # Counted here, in 32 bits: a fori_loop of a known length counts in as many as JAX is set to.
    (_, scores), _ = lax.scan(step, begin, length=x_ref.shape[1] // block_h)
    if len(refs) == 5:
        scale = plt.load(refs[0].at[pl.ds(start, block_v)], mask=row < size, other=0.0)
        scores = scores * scale[:, None]
    scores = jnp.where((row < size)[:, None], scores, MASKED)
    peak = scores.max(0)
    peak_ref[...] = peak
    total_ref[...] = jnp.exp(scores - peak[None]).sum(0)
    slot = lax.broadcasted_iota(jnp.int32, (kept, columns), 0)
    rows = lax.broadcasted_iota(jnp.int32, (block_v, columns), 0)
    best, index = jnp.full((kept, columns), MASKED, jnp.float32), jnp.zeros((kept, columns), jnp.int32)
    for number in range(min(k, block_v)):
        at = lax.argmax(scores, 0, jnp.int32)  # the lower of equal ones
        best = jnp.where(slot == number, scores.max(0)[None], best)
        index = jnp.where(slot == number, start + at[None], index)
        scores = jnp.where(rows == at[None], -jnp.inf, scores)
    scores_ref[...] = best
    index_ref[...] = index
