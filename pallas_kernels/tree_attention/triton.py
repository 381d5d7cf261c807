"""Tree-masked decode attention as a Pallas kernel for CUDA (Triton): split-K, flash-decoding.

The queries of one KV head, T tokens by G heads, are the rows of one product. Each program takes a
block of rows and a share of the cache's live rows, and leaves a normalised mix and its log-sum-exp;
a few XLA operations weigh the shares together. Blocks that are committed as a whole need no mask;
in the last ones a row's ancestors are tested as bits of int32 words, so no mask is ever in memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dispatch import check_blocks, power_of_two
from pallas_kernels.products import precision_of
from pallas_kernels.visibility import Sees

MASKED = -1e30  # finite, so that a row which sees nothing in a share leaves no NaN behind
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


def tree_attention(q: Array, keys: Array, values: Array, sees: Sees, config: Config, interpret: bool) -> Array:
    """`pallas_kernels.tree_attention.tree_attention`, by the kernel; arguments and result as there."""
    tokens, heads, head_dim = q.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    rows, width = tokens * group, power_of_two(head_dim)
    padded = -(-rows // config.block_q) * config.block_q
    folded = q.reshape(tokens, kv_heads, group, head_dim).transpose(1, 0, 2, 3).reshape(kv_heads, rows, head_dim)
    folded = jnp.pad(folded, ((0, 0), (0, padded - rows), (0, width - head_dim)))
    words = jnp.pad(jnp.repeat(sees.ancestors, group, axis=0).T, ((0, 0), (0, padded - rows)))  # [W, rows]
    kernel = functools.partial(_kernel, config=config, tokens=tokens)
    block = pl.BlockSpec((None, config.block_q, width), lambda head, row, split: (head, row, 0))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    mixed, weight = pl.pallas_call(
        kernel,
        grid=(kv_heads, padded // config.block_q, config.splits),
        in_specs=[
            block,
            (whole, whole),
            pl.BlockSpec((words.shape[0], config.block_q), lambda head, row, split: (0, row)),
            pl.BlockSpec((1,), lambda head, row, split: (0,)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, config.block_q, width), lambda head, row, split: (split, head, row, 0)),
            pl.BlockSpec((None, None, config.block_q), lambda head, row, split: (split, head, row)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((config.splits, kv_heads, padded, width), jnp.float32),
            jax.ShapeDtypeStruct((config.splits, kv_heads, padded), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="tree_attention",
    )(folded, (keys, values), words, sees.committed[None])
    if config.splits > 1:
        share = jax.nn.softmax(weight, axis=0)
        mixed = (share[..., None] * mixed).sum(0)
    else:
        mixed = mixed[0]
    out = mixed[:, :rows, :head_dim].reshape(kv_heads, tokens, group, head_dim).transpose(1, 0, 2, 3)
    return out.reshape(tokens, heads, head_dim).astype(q.dtype)


def _kernel(
    q_ref: Any,
    cache_ref: tuple[Any, Any],
    words_ref: Any,
    committed_ref: Any,
    out_ref: Any,
    weight_ref: Any,
    *,
    config: Config,
    tokens: int,
) -> None:
    """One block of rows against one share of the cache.

    Refs: q [block_q, width], width the power of two that holds head_dim; cache: keys and values, each
    [kv_heads, S, head_dim]; words [W, block_q]; committed [1]; out [block_q, width] and weight [block_q], the
    log-sum-exp of the share's scores.
    """
    head, split, step = pl.program_id(0), pl.program_id(2), config.block_k
    q, committed = q_ref[...], committed_ref[0]
    keys_ref, values_ref = cache_ref
    head_dim, width = keys_ref.shape[2], q.shape[1]
    lines = [words_ref[word, :] for word in range(words_ref.shape[0])]
    precision = precision_of(q)

    def rows_of(ref: Any, block: Array) -> Array:
        if width == head_dim:
            return plt.load(ref.at[head, pl.ds(block * step, step)])
        # Row by row and column by column, since a slice may not be wider than the array: JAX 0.12 refuses one.
        row, column = block * step + _count(step), _count(width)
        inside = jnp.broadcast_to(column < head_dim, (step, width))
        return plt.load(ref.at[head, row[:, None], column[None]], mask=inside, other=0.0)

    def visible(block: Array) -> Array:
        row = block * step + _count(step) - committed  # counted from the first row of the tree
        seen = jnp.broadcast_to((row < 0)[None], (config.block_q, step))
        for number, line in enumerate(lines):
            bit = lax.shift_right_logical(line[:, None], jnp.broadcast_to((row & 31)[None], seen.shape)) & 1
            seen = seen | (((row >> 5) == number)[None] & (bit == 1))
        return seen

    def take_in(block: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        peak, total, mixed = carry
        k, v = rows_of(keys_ref, block), rows_of(values_ref, block)
        scores = lax.dot_general(
            q, k, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        ) * (head_dim**-0.5)
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
    share = (blocks + config.splits - 1) // config.splits
    first = jnp.minimum(split * share, blocks)
    last = jnp.minimum(first + share, blocks)
    whole = jnp.clip(committed // step, first, last)  # blocks below it are committed as a whole
    carry = (
        jnp.full((config.block_q,), MASKED, jnp.float32),
        jnp.zeros((config.block_q,), jnp.float32),
        jnp.zeros((config.block_q, width), jnp.float32),
    )
    carry = lax.fori_loop(first, whole, functools.partial(take_in, masked=False), carry)
    peak, total, mixed = lax.fori_loop(whole, last, functools.partial(take_in, masked=True), carry)
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out_ref[...] = mixed / total[:, None]
    weight_ref[...] = jnp.where(empty, MASKED, peak + jnp.log(total))


def _count(size: int) -> Array:
    """0, 1, ... size - 1, of 32 bits under any setting of JAX."""
    return lax.iota(jnp.int32, size)
