"""Tree attention in XLA: over the whole cache where it is small, and over the blocks that live where it is not."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.bits import floats_of
from pallas_kernels.products import capped, einsum_f32
from pallas_kernels.tree_attention.triton import MASKED
from pallas_kernels.visibility import Sees

BLOCK = 256  # cache rows a step; capacities are multiples of it
UNIT = 2.0**22  # of the integers that weights in [0, 1] are added up as: 512 of them fit 32 bits
MANY = 64  # tokens from which on the queries, and no longer the keys, are most of what there is to move
DENSE_LIMIT = 512  # up to this capacity one product over the whole cache beats a loop over its live part

# Numbers of a value that `steady_mix` adds up together: of wider ones XLA's CPU backend splits the sum over the keys,
# where a masked key more or less moves the border.
WIDEST = 128


def tree_attention(q: Array, keys: Array, values: Array, sees: Sees, how: How) -> Array:
    """`pallas_kernels.tree_attention.tree_attention` as a CPU is quick at it; arguments and result as there."""
    return _of_one(q, Rows(keys, values), sees, how)


def in_slots(q: Array, keys: Array, values: Array, sees: Sees, slot: Array, how: How) -> Array:
    """The same of B sequences in a pool, one after the other: no sequence waits for longer ones."""
    if q.shape[0] == 1:
        return _of_one(q[0], Rows(keys, values, slot[0]), sees.only(), how)[None]
    return lax.map(lambda own: _of_one(own[0], Rows(keys, values, own[2]), own[1], how), (q, sees, slot))


@dataclasses.dataclass(frozen=True)
class How:
    """What is the same in all layers of a kind: a static part of the compiled program."""

    # Scores go through cap tanh(score / cap) before the mask (Gemma 2); 0: as they are.
    cap: float = 0.0
    steady: bool = True  # see `steady_mix`; matters for bfloat16 on a CPU alone
    # None beyond these is seen; None: all of S may be. XLA on a GPU then reads no others.
    rows: int | None = None

    def scores(self, products: Array, head_dim: int) -> Array:
        """Scores of the products of keys and `scaled` queries."""
        return capped(products if _has_exact_scale(head_dim) else products * head_dim**-0.5, self.cap)


def scaled(q: Array) -> Array:
    """Queries [..., head_dim], scaled where no score changes by a bit: there are fewer of them than of scores."""
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype) if _has_exact_scale(q.shape[-1]) else q


def _has_exact_scale(head_dim: int) -> bool:
    """Whether 1/sqrt(head_dim) is a power of two."""
    return head_dim in (4**power for power in range(8))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A sequence's keys and values, in a pool."""

    keys: Array  # [kv_heads, S, head_dim], or with a slot [slots, kv_heads, S, head_dim]
    values: Array
    slot: Array | None = None  # int32, in a pool

    @property
    def shape(self) -> tuple[int, int, int]:
        """kv_heads, S, head_dim."""
        kv_heads, capacity, head_dim = self.keys.shape[-3:]
        return kv_heads, capacity, head_dim

    @property
    def dtype(self) -> jnp.dtype:
        return self.keys.dtype

    def some(self, first: Array | int, count: int) -> tuple[Array, Array]:
        """`count` rows from `first` on: [kv_heads, count, head_dim] each."""
        kv_heads, capacity, head_dim = self.shape
        if self.slot is None:
            if count == capacity:
                return self.keys, self.values
            keys, values = (lax.dynamic_slice_in_dim(rows, first, count, axis=1) for rows in (self.keys, self.values))
            return keys, values
        zero = jnp.int32(0)
        at = (self.slot, zero, jnp.asarray(first, jnp.int32), zero)
        keys, values = (
            lax.dynamic_slice(rows, at, (1, kv_heads, count, head_dim)) for rows in (self.keys, self.values)
        )
        return keys[0], values[0]


def _of_one(q: Array, rows: Rows, sees: Sees, how: How) -> Array:
    """The same of one sequence: [T, heads, head_dim]."""
    tokens, heads, head_dim = q.shape
    kv_heads, capacity, _ = rows.shape
    group = heads // kv_heads
    steady = how.steady and rows.dtype == jnp.uint16  # bfloat16 on a CPU
    if tokens >= MANY and capacity > DENSE_LIMIT and not steady:
        return _of_many(q, rows, sees, how)
    # Grouped-query attention: the queries of one KV head are columns of one product. The keys stand on its
    # left, as they lie in the cache; on the right, XLA's CPU backend would transpose all of them each time.
    columns = scaled(q).reshape(tokens, kv_heads, group, head_dim).transpose(1, 3, 0, 2).reshape(kv_heads, head_dim, -1)
    queries = tokens * group
    alone = 1 if steady and queries == 1 else 0  # what XLA's CPU backend rounds otherwise than the columns of a matrix
    columns = jnp.pad(columns, ((0, 0), (0, 0), (0, alone)))
    spare = max(0, _least_queries(kv_heads) - queries) if steady else 0

    def scores(first: Array | int, k: Array) -> Array:
        with jax.named_scope("scores"):
            # Without the barrier XLA swaps the operands back to save the transposition, at 1.7 times the cost.
            products = lax.optimization_barrier(
                einsum_f32("hkd,hdq->hkq", floats_of(k).astype(q.dtype), columns)
            ).swapaxes(1, 2)
            products = jnp.pad(products, ((0, 0), (0, spare - alone), (0, 0)))
            visible = sees.rows(first + jnp.arange(k.shape[1], dtype=jnp.int32))  # [T, k]
            masked = jnp.repeat(visible, group, axis=0)
            masked = jnp.pad(masked, ((0, spare), (0, 0)), constant_values=True)[None]
            return jnp.where(masked, how.scores(products, head_dim), MASKED)

    mix = steady_mix if steady else functools.partial(_mix, q.dtype)
    if capacity <= DENSE_LIMIT:
        keys, values = rows.some(0, capacity)
        s = scores(0, keys)
        total, out = mix(jnp.exp(s - s.max(-1, keepdims=True)), values)
        out /= total[..., None]
    else:
        step = functools.partial(_block, scores, mix, rows)
        first, live = _first_block(sees), _live_blocks(capacity, sees)
        _, total, out = lax.fori_loop(first, live, step, _nothing(rows, queries + spare))
        out /= total[..., None]
    out = out[:, :queries].reshape(kv_heads, tokens, group, head_dim).transpose(1, 0, 2, 3)
    return out.reshape(tokens, heads, head_dim).astype(q.dtype)


def _of_many(q: Array, rows: Rows, sees: Sees, how: How) -> Array:
    """The same for a chunk of a prompt: 0.7 of the time, for 256 tokens of SmolLM2-135M on two cores.

    Without a window only the last blocks have rows that some token does not see; before them nothing is masked. And
    the queries of a KV head stand group by group, so that one mask serves all groups.
    """
    (tokens, heads, head_dim), kv_heads = q.shape, rows.shape[0]
    group = heads // kv_heads
    queries = scaled(q).reshape(tokens, kv_heads, group, head_dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)

    def scores(first: Array, k: Array) -> Array:
        return how.scores(einsum_f32("hqd,hkd->hqk", queries, floats_of(k).astype(q.dtype)), head_dim)

    def masked(first: Array, k: Array) -> Array:
        visible = sees.rows(first + jnp.arange(k.shape[1], dtype=jnp.int32))  # [T, k]
        # Behind a barrier, or XLA would work out every bit once for each head.
        visible = lax.optimization_barrier(visible)
        by_group = scores(first, k).reshape(kv_heads, group, *visible.shape)
        return jnp.where(visible, by_group, MASKED).reshape(kv_heads, -1, k.shape[1])

    mix, count = functools.partial(_mix, q.dtype), queries.shape[1]
    live, carry = _live_blocks(rows.shape[1], sees), _nothing(rows, count)
    begin = _first_block(sees)
    if sees.first is None:
        whole = sees.committed // BLOCK
        carry = lax.fori_loop(begin, whole, functools.partial(_block, scores, mix, rows), carry)
        begin = whole
    carry = lax.fori_loop(begin, live, functools.partial(_block, masked, mix, rows), carry)
    out = (carry[2] / carry[1][..., None]).reshape(kv_heads, group, tokens, head_dim)
    return out.transpose(2, 0, 1, 3).reshape(q.shape).astype(q.dtype)


def straight(q: Array, keys: Array, values: Array, sees: Sees, cap: float = 0.0) -> Array:
    """The same for a GPU: the textbook's formula over the whole cache, in straight-line code.

    A loop whose end is not known beforehand would make the host wait for the device at each iteration.
    """
    (tokens, heads, head_dim), kv_heads = q.shape, keys.shape[0]
    group = heads // kv_heads
    rows = scaled(q).reshape(tokens, kv_heads, group, head_dim).transpose(1, 0, 2, 3).reshape(kv_heads, -1, head_dim)
    visible = jnp.repeat(sees.dense(keys.shape[1]), group, axis=0)[None]
    scores = How(cap).scores(einsum_f32("hqd,hkd->hqk", rows, keys.astype(q.dtype)), head_dim)
    scores = jnp.where(visible, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    mixed = einsum_f32("hqk,hkd->hqd", weights, values.astype(q.dtype)).astype(q.dtype)
    return mixed.reshape(kv_heads, tokens, group, head_dim).transpose(1, 0, 2, 3).reshape(q.shape)


def _mix(dtype: jnp.dtype, weights: Array, values: Array) -> tuple[Array, Array]:
    """Sums [kv_heads, q] of weights [kv_heads, q, k], and the weights' product with values [kv_heads, k, head_dim]."""
    return weights.sum(-1), einsum_f32("hqk,hkd->hqd", weights.astype(dtype), floats_of(values).astype(dtype))


def steady_mix(weights: Array, values: Array) -> tuple[Array, Array]:
    """The same, rounded the same for one token and for a tree of many, wherever in the cache its keys stand.

    XLA's CPU backend adds up a float32 product of this form key by key, so that masked keys between two visible
    ones change no bit; the weights are added up as integers, which have one sum in any order. Then vanilla and
    speculative decoding write the same text in bfloat16 too, where rounding would otherwise decide a tie every few
    hundred tokens.
    """
    values = floats_of(values).astype(jnp.float32)
    sums = jnp.rint(weights * UNIT).astype(jnp.uint32).sum(-1, dtype=jnp.uint32).astype(jnp.float32) / UNIT
    parts = [values[..., first : first + WIDEST] for first in range(0, values.shape[-1], WIDEST)]
    mixed = [lax.optimization_barrier(einsum_f32("hqk,hkd->hqd", weights, part)) for part in parts]
    return sums, mixed[0] if len(mixed) == 1 else jnp.concatenate(mixed, -1)


def _least_queries(kv_heads: int) -> int:
    """Queries a KV head below which XLA's CPU backend rounds exponentials with other instructions.

    It does so for arrays of fewer than 4,096 numbers: 16 rows of a block of 256 keys, over all KV heads.
    """
    return max(4, -(-16 // kv_heads))


def seam(capacity: int, dtype: jnp.dtype, steady: bool) -> int | None:
    """Every how many rows of a cache of `dtype` a `steady_mix` begins anew; None: it does not, or there is none.

    Rows of two blocks are added up apart. So a token rounds as it will when all before it have moved to where they
    stay, if each of them stands in that block already.
    """
    return BLOCK if steady and dtype == jnp.uint16 and capacity > DENSE_LIMIT else None


# Online softmax over the blocks that hold live rows, so that free capacity costs nothing: of each query the largest
# score so far, the sum of its weights, and the sum of values by them.
Softmax = tuple[Array, Array, Array]


def _nothing(rows: Rows, queries: int) -> Softmax:
    """Before the first block."""
    kv_heads, _, head_dim = rows.shape
    zeros = jnp.zeros((kv_heads, queries), jnp.float32)
    return zeros + MASKED, zeros, jnp.zeros((kv_heads, queries, head_dim), jnp.float32)


def _first_block(sees: Sees) -> Array:
    return jnp.int32(0) if sees.first is None else sees.first.min() // BLOCK


def _live_blocks(capacity: int, sees: Sees) -> Array:
    return jnp.minimum(-(-sees.end // BLOCK), capacity // BLOCK)


def _block(
    scores: Callable[[Array, Array], Array],
    mix: Callable[[Array, Array], tuple[Array, Array]],
    rows: Rows,
    block: Array,
    carry: Softmax,
) -> Softmax:
    """One block more."""
    peak, total, out = carry
    k, v = rows.some(block * BLOCK, BLOCK)
    s = scores(block * BLOCK, k)
    new_peak = jnp.maximum(peak, s.max(-1))
    weights = jnp.exp(s - new_peak[..., None])
    old = jnp.exp(peak - new_peak)
    sums, mixed = mix(weights, v)
    return new_peak, total * old + sums, out * old[..., None] + mixed
