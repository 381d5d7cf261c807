"""Tree-masked decode attention as a Pallas kernel for CUDA (Triton): split-K, flash-decoding.

The queries of one KV head, T tokens by G heads, are the rows of one product. Each program takes a
block of rows and a share of the cache's live rows, and leaves a normalised mix and its log-sum-exp;
a second, small kernel weighs the shares together. Blocks that are committed as a whole need no mask;
in the last ones a row's ancestors are tested as bits of int32 words, so no mask is ever in memory.
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

from pallas_kernels.dispatch import check_blocks, divided, power_of_two
from pallas_kernels.products import precision_of
from pallas_kernels.visibility import Sees

MASKED = -1e30  # finite, so that a row which sees nothing in a share leaves no NaN behind
COMBINED = 16  # rows a program of the second kernel
PROGRAMS = 132  # what the splits aim at: one program for each multiprocessor of an H100


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel divides its work.

    block_q: rows (token times query head) a program, at least 16. block_k: cache rows a step, a
    divisor of the capacity. splits: shares of the cache, worked on side by side.
    """

    block_q: int = 64
    block_k: int = 64
    splits: int = 8
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_blocks(self, "block_q", "block_k")

    @classmethod
    def suited_to(cls, rows: int, kv_heads: int) -> Config:
        """A config for `rows` = T G rows a KV head, before anything is measured: enough programs to fill the device."""
        block_q = min(64, power_of_two(rows))
        programs = kv_heads * -(-rows // block_q)
        return cls(block_q=block_q, splits=min(16, power_of_two(-(-PROGRAMS // programs), least=1)))


@functools.partial(jax.jit, static_argnames=("config", "cap", "interpret"))  # equal layers are lowered once
def tree_attention(
    q: Array, keys: Array, values: Array, sees: Sees, slot: Array | None, config: Config, cap: float, interpret: bool
) -> Array:
    """`pallas_kernels.tree_attention._of_each`, by the kernels; arguments and result as there."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    slot = jnp.zeros(batch, jnp.int32) if slot is None else slot
    group = heads // kv_heads
    blocks = -(-tokens * group // config.block_q)
    padded = blocks * config.block_q
    whole = pl.BlockSpec(memory_space=pl.ANY)
    window = () if sees.first is None else (sees.first,)
    mixed, weight = pl.pallas_call(
        functools.partial(_attend, config=config, group=group, cap=cap),
        grid=(batch * kv_heads, blocks, config.splits),
        in_specs=[whole] * (6 + len(window)),
        out_specs=[
            pl.BlockSpec((None, None, config.block_q, head_dim), lambda head, row, split: (split, head, row, 0)),
            pl.BlockSpec((None, None, config.block_q), lambda head, row, split: (split, head, row)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((config.splits, batch * kv_heads, padded, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((config.splits, batch * kv_heads, padded), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="tree_attention",
    )(q, keys, values, sees.ancestors, sees.committed, slot, *window)
    return pl.pallas_call(
        functools.partial(_combine, splits=config.splits, group=group),
        grid=(batch * kv_heads, padded // COMBINED),
        in_specs=[whole] * 2,
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="tree_attention_combine",
    )(mixed, weight)


def _attend(*refs: Any, config: Config, group: int, cap: float) -> None:
    """One block of rows against one share of the cache.

    Refs: q [B, T, heads, head_dim]; keys and values [slots, kv_heads, S, head_dim]; ancestors [B, T, W]; committed and
    slot [B]; first [B, T], if there is a window; out [block_q, head_dim] and weight [block_q], the log-sum-exp of the
    share's scores.
    """
    q_ref, keys_ref, values_ref, ancestors_ref, committed_ref, slot_ref, *window, out_ref, weight_ref = refs
    text, head = divided(pl.program_id(0), keys_ref.shape[1])
    split, step = pl.program_id(2), config.block_k
    tokens, head_dim = q_ref.shape[1], q_ref.shape[3]
    committed, slot = committed_ref[text], slot_ref[text]
    row = pl.program_id(1) * config.block_q + _count(config.block_q)
    # Rows past the end do the last token's work again.
    token, query = divided(row, group)
    token = jnp.minimum(token, tokens - 1)
    column = _count(power_of_two(head_dim))
    real = column < head_dim
    here = (config.block_q, column.shape[0])
    q = plt.load(
        q_ref.at[
            *(jnp.broadcast_to(a, here) for a in (text, token[:, None], (head * group + query)[:, None], column[None]))
        ],
        mask=jnp.broadcast_to(real[None], here),
        other=0.0,
    )
    mine = jnp.broadcast_to(text, token.shape)
    words = [
        plt.load(ancestors_ref.at[mine, token, jnp.full_like(token, word)]) for word in range(ancestors_ref.shape[2])
    ]
    nearest = [plt.load(ref.at[mine, token]) for ref in window]  # the first row that each sees, if there is a window
    precision = precision_of(q)

    def rows_of(ref: Any, block: Array) -> Array:
        if column.shape[0] == head_dim:
            return plt.load(ref.at[slot, head, pl.ds(block * step, step)])
        # Row by row and column by column, since a slice may not be wider than the array: JAX 0.12 refuses one.
        row = block * step + _count(step)
        inside = jnp.broadcast_to(real[None], (step, column.shape[0]))
        return plt.load(ref.at[slot, head, row[:, None], column[None]], mask=inside, other=0.0)

    def visible(block: Array) -> Array:
        row = block * step + _count(step) - committed  # counted from the first row of the tree
        seen = jnp.broadcast_to((row < 0)[None], (config.block_q, step))
        for first in nearest:
            seen = seen & (row[None] >= (first - committed)[:, None])
        for number, line in enumerate(words):
            bit = lax.shift_right_logical(line[:, None], jnp.broadcast_to((row & 31)[None], seen.shape)) & 1
            seen = seen | (((row >> 5) == number)[None] & (bit == 1))
        return seen

    def take_in(block: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        peak, total, mixed = carry
        k, v = rows_of(keys_ref, block), rows_of(values_ref, block)
        scores = lax.dot_general(
            q.astype(k.dtype), k, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        ) * (head_dim**-0.5)
        if cap:
            # tanh by the exponential, as Triton has it.
            scores = cap * (2 * jax.nn.sigmoid(scores * (2 / cap)) - 1)
        if masked:
            scores = jnp.where(visible(block), scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.exp(scores - new_peak[:, None])
        old = jnp.exp(peak - new_peak)
        mix = lax.dot_general(
            weights.astype(v.dtype),
            v,
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return new_peak, total * old + weights.sum(-1), mixed * old[:, None] + mix

    blocks = (committed + tokens + step - 1) // step
    begin = functools.reduce(jnp.minimum, [rows.min() // step for rows in nearest], blocks) if nearest else 0
    share = (blocks - begin + config.splits - 1) // config.splits
    first = jnp.minimum(begin + split * share, blocks)
    last = jnp.minimum(first + share, blocks)
    # Blocks below it are committed as a whole, and seen as a whole where there is no window.
    whole = first if nearest else jnp.clip(committed // step, first, last)
    carry = (
        jnp.full((config.block_q,), MASKED, jnp.float32),
        jnp.zeros((config.block_q,), jnp.float32),
        jnp.zeros(here, jnp.float32),
    )
    carry = lax.fori_loop(first, whole, functools.partial(take_in, masked=False), carry)
    peak, total, mixed = lax.fori_loop(whole, last, functools.partial(take_in, masked=True), carry)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    if column.shape[0] == head_dim:
        out_ref[...] = mixed / total[:, None]
    else:
        row = jnp.broadcast_to(_count(config.block_q)[:, None], here)
        inside = jnp.broadcast_to(real[None], here)
        plt.store(out_ref.at[row, jnp.broadcast_to(column[None], here)], mixed / total[:, None], mask=inside)
    weight_ref[...] = jnp.where(empty, MASKED, peak + jnp.log(total))


def _combine(mixed_ref: Any, weight_ref: Any, out_ref: Any, *, splits: int, group: int) -> None:
    """The shares of `COMBINED` rows, weighed together.

    Refs: mixed [splits, B kv_heads, rows, head_dim] and weight [splits, B kv_heads, rows]; out [B, T, heads, head_dim].
    """
    program, block = pl.program_id(0), pl.program_id(1)
    _, tokens, heads, head_dim = out_ref.shape
    text, head = divided(program, heads // group)
    column = _count(power_of_two(head_dim))
    here = (COMBINED, column.shape[0])
    row = block * COMBINED + _count(COMBINED)
    wide, across = jnp.broadcast_to(row[:, None], here), jnp.broadcast_to(column[None], here)
    real = across < head_dim
    shares = [np.int32(split) for split in range(splits)]  # of 32 bits under any setting of JAX
    weights = [plt.load(weight_ref.at[split, program, row]) for split in shares]
    peak = functools.reduce(jnp.maximum, weights)
    mixed, total = jnp.zeros(here, jnp.float32), jnp.zeros((COMBINED,), jnp.float32)
    for split, weight in zip(shares, weights, strict=True):
        share = jnp.exp(weight - peak)
        rows = plt.load(mixed_ref.at[split, program, wide, across], mask=real, other=0.0)
        mixed, total = mixed + share[:, None] * rows, total + share
    token, query = divided(wide, group)
    at = (jnp.broadcast_to(text, here), token, head * group + query, across)
    mine = real & (wide < tokens * group)
    plt.store(out_ref.at[*at], (mixed / total[:, None]).astype(out_ref.dtype), mask=mine)


def _count(size: int) -> Array:
    """0, 1, ... size - 1, of 32 bits under any setting of JAX."""
    return lax.iota(jnp.int32, size)
