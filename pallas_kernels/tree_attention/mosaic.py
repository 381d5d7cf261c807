"""Tree-masked decode attention in Mosaic GPU, for Hopper: what `triton` does, with wgmma and TMA.

A program is one warpgroup. It takes 64 rows, so many tokens of so many query heads of one KV head, and a share of the
cache's live blocks, which TMA brings into shared memory some steps ahead. The softmax's weights go back through shared
memory, since JAX's interpreter of these kernels knows no product of registers: so what the tests run is what compiles.
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
from jax.experimental.pallas import mosaic_gpu as mgpu

from pallas_kernels.dispatch import divided
from pallas_kernels.tree_attention.mosaic_config import ROWS, WIDEST, Config
from pallas_kernels.tree_attention.triton import MASKED
from pallas_kernels.visibility import Sees

LOG2E = math.log2(math.e)
BOX = 256  # numbers that TMA moves at most along one axis


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """How the rows of one KV head, T tokens by `group` query heads, fall into blocks of 64.

    A block is `heads` runs of `each` rows: of one query head a run, `each` tokens in order. Rows of tokens past the
    end are zeros, those that no run fills are anything: a row's result depends on no other row.
    """

    tokens: int
    group: int

    @property
    def each(self) -> int:
        """Tokens a block: a power of two, so that a row's token is some of its bits."""
        return max(8, 1 << (ROWS // self.group).bit_length() - 1) if self.group <= ROWS else 8

    @property
    def heads(self) -> int:
        return min(self.group, ROWS // self.each)

    @property
    def along(self) -> int:
        """Blocks until all tokens had their turn."""
        return -(-self.tokens // self.each)

    @property
    def count(self) -> int:
        return self.along * -(-self.group // self.heads)

    @property
    def left(self) -> int:
        """Tokens of the last block along."""
        return self.tokens - (self.along - 1) * self.each

    def first(self, block: Array) -> tuple[Array, Array]:
        """The first token and the first query head (of the group) of a block."""
        query, along = divided(block, self.along)
        return along * self.each, query * self.heads


@functools.partial(jax.jit, static_argnames=("config", "interpret"))  # equal layers are lowered once
def tree_attention(q: Array, keys: Array, values: Array, sees: Sees, config: Config, interpret: Any = False) -> Array:
    """`pallas_kernels.tree_attention.tree_attention`, by the kernels; arguments and result as there.

    interpret: whether to run on any device, slowly; or how (`interpret_params`).
    """
    tokens, heads, head_dim = q.shape
    kv_heads = keys.shape[0]
    blocks = _Blocks(tokens, heads // kv_heads)
    width = min(head_dim, WIDEST)
    words = blocks.each * sees.ancestors.shape[1]
    how: dict[str, Any] = {
        "compiler_params": mgpu.CompilerParams(approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Warpgroup),
        "interpret": interpret_params() if interpret is True else interpret or None,
    }
    operand = functools.partial(_operand, dtype=q.dtype, columns=head_dim)
    mixed, weight = mgpu.kernel(
        functools.partial(_attend, config=config, blocks=blocks),
        out_type=[
            jax.ShapeDtypeStruct((config.splits, kv_heads, blocks.count, ROWS, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((config.splits, kv_heads, blocks.count, ROWS), jnp.float32),
        ],
        scratch_types=[
            _lines((ROWS, head_dim), q.dtype),
            operand((ROWS, head_dim)),
            operand((config.stages, config.block_k, head_dim)),
            operand((config.stages, config.block_k, width)),
            operand((ROWS, config.block_k)),
            mgpu.SMEM((words,), jnp.int32),
            mgpu.Barrier(num_arrivals=blocks.heads + -(-words // BOX)),
            mgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
        ],
        grid=(kv_heads, blocks.count, config.splits, head_dim // width),
        grid_names=("head", "block", "split", "part"),
        kernel_name="tree_attention",
        **how,
    )(q, keys, values, sees.ancestors.reshape(-1), sees.committed[None])
    strip = next(columns for columns in (32, 16) if head_dim % columns == 0)
    return mgpu.kernel(
        functools.partial(_combine, blocks=blocks),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            _operand((config.splits, ROWS, strip), dtype=jnp.float32, columns=strip),
            mgpu.SMEM((config.splits, ROWS), jnp.float32),
            _lines((ROWS, strip), q.dtype),
            mgpu.Barrier(num_arrivals=2 * config.splits),
        ],
        grid=(kv_heads, blocks.count, head_dim // strip),
        grid_names=("head", "block", "strip"),
        kernel_name="tree_attention_combine",
        **how,
    )(mixed, weight)


def interpret_params(**settings: Any) -> Any:
    """How JAX interprets a kernel in Mosaic GPU: public from JAX 0.11 on."""
    return mgpu.InterpretGPUParams(**settings)


def _rows(cache: Any, head: Array, first: Array, count: int, columns: Any) -> Any:
    """`count` rows of a cache in memory, from `first` on. All that the kernel knows of a cache's axes is here."""
    return cache.at[head, pl.ds(first, count), columns]


def _attend(*refs: Any, config: Config, blocks: _Blocks) -> None:
    """One block of rows against one share of the cache, for a part of the values' columns.

    Refs: q [T, heads, head_dim]; keys and values [kv_heads, S, head_dim]; ancestors [T W]; committed [1]; of the
    result, mixed [splits, kv_heads, blocks, 64, head_dim] and weight [splits, kv_heads, blocks, 64], the log-sum-exp
    of the share's scores; then shared memory and barriers.
    """
    q_ref, keys_ref, values_ref, ancestors_ref, committed_ref, mixed_ref, weight_ref, *scratch = refs
    came, q, keys, values, weighed, words, begun, arrived = scratch
    head, block, split, part = (lax.axis_index(name) for name in ("head", "block", "split", "part"))
    step, stages, width = config.block_k, config.stages, values.shape[2]
    (tokens, _, head_dim), each = q_ref.shape, blocks.each
    lines = words.shape[0] // each  # words a token
    first_token, first_query = blocks.first(block)

    for run in range(blocks.heads):
        query = jnp.minimum(first_query + run, blocks.group - 1)
        row = q_ref.at[pl.ds(first_token, each), head * blocks.group + query]
        mgpu.copy_gmem_to_smem(row, came.at[pl.ds(run * each, each)], begun)
    for at in range(0, words.shape[0], BOX):
        some = min(BOX, words.shape[0] - at)
        mgpu.copy_gmem_to_smem(
            ancestors_ref.at[pl.ds(first_token * lines + at, some)], words.at[pl.ds(at, some)], begun
        )

    committed = committed_ref[0]
    live, _ = divided(committed + (tokens + step - 1), step)
    share, _ = divided(live + (config.splits - 1), config.splits)
    first = jnp.minimum(split * share, live)
    last = jnp.minimum(first + share, live)
    whole = jnp.clip(divided(committed, step)[0], first, last)  # blocks below it are committed as a whole

    def place(number: Array) -> Array:
        return divided(number - first, stages)[1]

    def fetch(number: Array) -> None:
        @pl.when(number < last)
        def _() -> None:
            at = place(number)
            mgpu.copy_gmem_to_smem(_rows(keys_ref, head, number * step, step, slice(None)), keys.at[at], arrived.at[at])
            mine = pl.ds(part * width, width)
            mgpu.copy_gmem_to_smem(_rows(values_ref, head, number * step, step, mine), values.at[at], arrived.at[at])

    for ahead in range(stages - 1):
        fetch(first + ahead)
    mgpu.barrier_wait(begun)
    # Once more through registers: what T rows fill by TMA, T being any number, does not lie as wgmma reads it.
    q[...] = mgpu.load(came, layout=mgpu.Layout.WGMMA, optimized=False)
    mgpu.commit_smem()

    token_of_row = lax.iota(jnp.int32, ROWS) & (each - 1)

    def gather(token: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        mine = token_of_row == token
        return tuple(jnp.where(mine, words[token * lines + line], had) for line, had in enumerate(found))

    real = jnp.minimum(tokens - first_token, each)  # tokens of this block
    ancestors = lax.fori_loop(np.int32(0), real, gather, (jnp.zeros((ROWS,), jnp.int32),) * lines)

    def visible(number: Array) -> Array:
        row = lax.broadcasted_iota(jnp.int32, (ROWS, step), 1) + (number * step - committed)  # from the tree's first on
        seen = row < 0
        for line, word in enumerate(ancestors):
            bit = lax.shift_right_logical(_across(word, step), row & 31) & 1
            seen = seen | (((row >> 5) == line) & (bit == 1))
        return seen

    def take_in(number: Array, carry: Any, masked: bool) -> Any:
        peak, total, mixed = carry
        at = place(number)
        mgpu.barrier_wait(arrived.at[at])
        # In powers of two, as the hardware has them.
        scores = _product(q, keys.at[at].transpose((1, 0))) * (head_dim**-0.5 * LOG2E)
        if masked:
            scores = jnp.where(visible(number), scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(1))
        weights = jnp.exp2(scores - _across(new_peak, step))
        old = jnp.exp2(peak - new_peak)
        total = total * old + weights.sum(1)
        weighed[...] = weights.astype(weighed.dtype)
        # A barrier for the warpgroup too: each of its warps is done with the block before, whose place is free now.
        mgpu.commit_smem()
        fetch(number + (stages - 1))
        mixes = (_product(weighed, values.at[at, :, columns]) for columns in strips)
        mixed = tuple(had * _across(old, had.shape[1]) + mix for had, mix in zip(mixed, mixes, strict=True))
        return new_peak, total, mixed

    # Of a product by strips, the sums of only one are in registers beside the sums so far.
    strip = 64 if step > 64 and width % 64 == 0 else width
    strips = [pl.ds(at, strip) for at in range(0, width, strip)]
    carry = (
        mgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), mgpu.Layout.WGMMA.reduce(1)),
        mgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), mgpu.Layout.WGMMA.reduce(1)),
        tuple(mgpu.layout_cast(jnp.zeros((ROWS, strip), jnp.float32), mgpu.Layout.WGMMA) for _ in strips),
    )
    carry = lax.fori_loop(first, whole, functools.partial(take_in, masked=False), carry)
    peak, total, mixed = lax.fori_loop(whole, last, functools.partial(take_in, masked=True), carry)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    by = _across(1 / total, strip)
    for at, mix in zip(range(0, width, strip), mixed, strict=True):
        mixed_ref[split, head, block, :, pl.ds(part * width + at, strip)] = mix * by
    # Every part has the same weights, and writes them.
    weight_ref[split, head, block] = jnp.where(empty, MASKED, (peak + jnp.log2(total)) / LOG2E)


def _combine(*refs: Any, blocks: _Blocks) -> None:
    """The shares of one block of rows, weighed together, for a strip of its columns.

    Refs: mixed and weight as `_attend` leaves them; out [T, heads, head_dim]; then shared memory and a barrier.
    """
    mixed_ref, weight_ref, out_ref, mixed, weights, out, arrived = refs
    head, block, strip = (lax.axis_index(name) for name in ("head", "block", "strip"))
    splits, _, width = mixed.shape
    columns = pl.ds(strip * width, width)
    for split in range(splits):
        mgpu.copy_gmem_to_smem(mixed_ref.at[split, head, block, :, columns], mixed.at[split], arrived)
        mgpu.copy_gmem_to_smem(weight_ref.at[split, head, block], weights.at[split], arrived)
    mgpu.barrier_wait(arrived)
    each = [weights[split] for split in range(splits)]
    peak = functools.reduce(jnp.maximum, each)
    total, result = jnp.zeros((ROWS,), jnp.float32), jnp.zeros((ROWS, width), jnp.float32)
    for split, weight in enumerate(each):
        share = jnp.exp(weight - peak)
        total, result = total + share, result + _across(share, width) * mixed[split]
    out[...] = (result * _across(1 / total, width)).astype(out.dtype)
    mgpu.commit_smem()
    first_token, first_query = blocks.first(block)

    def store(count: int) -> None:
        for run in range(blocks.heads):

            @pl.when(first_query + run < blocks.group)
            def _(run: int = run) -> None:
                query = head * blocks.group + first_query + run
                there = out_ref.at[pl.ds(first_token, count), query, columns]
                mgpu.copy_smem_to_gmem(out.at[pl.ds(run * blocks.each, count)], there)

    is_last = first_token + blocks.each > blocks.tokens - 1
    if blocks.left == blocks.each:
        store(blocks.each)
    else:
        pl.when(jnp.logical_not(is_last))(functools.partial(store, blocks.each))
        pl.when(is_last)(functools.partial(store, blocks.left))
    mgpu.wait_smem_to_gmem(0)


def _product(a: Any, b: Any) -> Array:
    """a [64, k] times b [k, n], both in shared memory: float32 [64, n]."""

    def multiply(sums: Any) -> Array:
        mgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(multiply, mgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _across(column: Array, width: int) -> Array:
    """A number a row, repeated along it."""
    return lax.broadcast_in_dim(column, (column.shape[0], width), (0,))


def _swizzle(columns: int, dtype: Any) -> tuple[int, mgpu.SwizzleTransform]:
    """The widest swizzle that rows of so many columns can have: in numbers, and as such."""
    size = jnp.dtype(dtype).itemsize
    swizzle = mgpu.find_swizzle(8 * size * columns)
    return swizzle // size, mgpu.SwizzleTransform(swizzle)


def _operand(shape: tuple[int, ...], *, dtype: Any, columns: int) -> Any:
    """Shared memory as wgmma reads it. Both operands of a product have the swizzle that suits `columns`."""
    tile, swizzle = _swizzle(columns, dtype)
    return mgpu.SMEM(shape, dtype, transforms=(mgpu.TilingTransform((8, tile)), swizzle))


def _lines(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory row by row, for copies of any number of rows: tiles of 8 rows would need a multiple of 8."""
    tile, swizzle = _swizzle(shape[-1], dtype)
    return mgpu.SMEM(shape, dtype, transforms=(mgpu.TilingTransform((tile,)), swizzle))
