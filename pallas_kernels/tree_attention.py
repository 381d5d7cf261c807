"""Attention of a few tokens over a KV cache, where the newest rows form a tree.

Row j of the cache is visible to query i if it is committed (j < committed), or if it is an ancestor
of i in the tree whose rows follow the committed ones: bit j - committed of `ancestors[i]`. A chain
of ancestors gives ordinary causal attention, so prefill, one token and a tree are one operation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import tree_attention_pallas
from pallas_kernels.dispatch import Implementation, choose
from pallas_kernels.products import einsum_f32
from pallas_kernels.tree_attention_pallas import MASKED, Config

BLOCK = 256  # cache rows a step; capacities are multiples of it
DENSE_LIMIT = 512  # up to this capacity one product over the whole cache beats a loop over its live part


def bit_words(visible: Array) -> Array:
    """Pack booleans [..., R] into int32 words [..., ceil(R / 32)], bit r % 32 of word r // 32."""
    rows = visible.shape[-1]
    words = -(-rows // 32)
    pad = [(0, 0)] * (visible.ndim - 1) + [(0, words * 32 - rows)]
    bits = jnp.pad(visible, pad).reshape(*visible.shape[:-1], words, 32).astype(jnp.uint32)
    return lax.bitcast_convert_type((bits << jnp.arange(32, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32), jnp.int32)


def has_bit(words: Array, row: Array) -> Array:
    """Whether bit `row` is set in `words` [T, W]: booleans [T, *row.shape]; rows outside 0 .. 32 W - 1 are unset."""
    inside = (row >= 0) & (row < 32 * words.shape[-1])
    at = jnp.where(inside, row, 0)
    return inside & ((words[:, at >> 5] >> (at & 31)) & 1).astype(bool)


def tree_attention(
    q: Array,
    keys: Array,
    values: Array,
    committed: Array,
    ancestors: Array,
    *,
    implementation: Implementation = "auto",
    config: Config | None = None,
) -> Array:
    """Softmax attention with float32 scores, scaled by 1/sqrt(head_dim).

    Args:
      q: [T, heads, head_dim], rotated.
      keys, values: [kv_heads, S, head_dim], the tree's own rows included; S a multiple of BLOCK.
      committed: int32 scalar, cache rows that every query sees.
      ancestors: [T, W] int32 bit words over the rows from `committed` on, each query's own included.
      implementation: see `dispatch`. config: the kernel's, instead of the one chosen for the shape.

    Returns:
      [T, heads, head_dim] in q's dtype.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = keys.shape[0]
    rows = tokens * heads // kv_heads
    shape = {"rows": rows, "kv_heads": kv_heads, "head_dim": head_dim}
    default = config or Config.suited_to(rows, kv_heads)
    implementation, chosen = choose(implementation, f"tree_attention {keys.dtype}", shape, default)
    if implementation == "xla":
        return _xla(q, keys, values, committed, ancestors)
    interpret = implementation == "interpret"
    return tree_attention_pallas.tree_attention(q, keys, values, committed, ancestors, chosen, interpret)


def _xla(q: Array, keys: Array, values: Array, committed: Array, ancestors: Array) -> Array:
    tokens, heads, head_dim = q.shape
    kv_heads, capacity, _ = keys.shape
    group = heads // kv_heads
    # Grouped-query attention: the queries of one KV head are columns of one product. The keys stand on its
    # left, as they lie in the cache; on the right, XLA's CPU backend would transpose all of them each time.
    columns = q.reshape(tokens, kv_heads, group, head_dim).transpose(1, 3, 0, 2).reshape(kv_heads, head_dim, -1)

    def scores(first: Array | int, k: Array) -> Array:
        with jax.named_scope("scores"):
            # Without the barrier XLA swaps the operands back to save the transposition, at 1.7 times the cost.
            products = lax.optimization_barrier(einsum_f32("hkd,hdq->hkq", k, columns)).swapaxes(1, 2)
            row = first + jnp.arange(k.shape[1])
            visible = (row < committed)[None] | has_bit(ancestors, row - committed)  # [T, k]
            masked = jnp.repeat(visible, group, axis=0)[None]
            return jnp.where(masked, products * head_dim**-0.5, MASKED)

    if capacity <= DENSE_LIMIT:
        weights = jax.nn.softmax(scores(0, keys), axis=-1)
        out = einsum_f32("hqk,hkd->hqd", weights.astype(values.dtype), values)
    else:
        out = _over_live_blocks(
            scores, (kv_heads, tokens * group, head_dim), keys, values, committed + 32 * ancestors.shape[1]
        )
    out = out.reshape(kv_heads, tokens, group, head_dim).transpose(1, 0, 2, 3)
    return out.reshape(tokens, heads, head_dim).astype(q.dtype)


def _over_live_blocks(scores, shape: tuple[int, ...], keys: Array, values: Array, live: Array) -> Array:
    """Online softmax over the blocks that hold live rows, so that free capacity costs nothing."""
    kv_heads, rows, head_dim = shape

    def step(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, out = carry
        at = (0, block * BLOCK, 0)
        k = lax.dynamic_slice(keys, at, (kv_heads, BLOCK, head_dim))
        v = lax.dynamic_slice(values, at, (kv_heads, BLOCK, head_dim))
        s = scores(block * BLOCK, k)
        new_peak = jnp.maximum(peak, s.max(-1))
        weights = jnp.exp(s - new_peak[..., None])
        old = jnp.exp(peak - new_peak)
        mix = einsum_f32("hqk,hkd->hqd", weights.astype(v.dtype), v)
        return new_peak, total * old + weights.sum(-1), out * old[..., None] + mix

    start = (
        jnp.full((kv_heads, rows), MASKED, jnp.float32),
        jnp.zeros((kv_heads, rows), jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    blocks = jnp.minimum(-(-live // BLOCK), keys.shape[1] // BLOCK)
    _, total, out = lax.fori_loop(0, blocks, step, start)
    return out / total[..., None]
