"""What stands between the product for Q, K and V and attention: rotate queries and keys, write keys and values.

The caches are updated in place: to XLA they are arguments that a launch may overwrite.
"""

from __future__ import annotations

import functools

from jax import Array

from pallas_kernels.batching import in_pool
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.rotary_append import triton, xla
from pallas_kernels.rotary_append.xla import HeadNorms, Rotation, rotate, written

__all__ = ["HeadNorms", "Rotation", "rotary_append", "rotate", "written"]


def rotary_append(
    qkv: Array,
    by: Rotation,
    keys: Array,
    values: Array,
    start: Array,
    *,
    slot: Array | None = None,
    skip: int = 0,
    norms: HeadNorms | None = None,
    implementation: Implementation = "auto",
) -> tuple[Array, Array, Array]:
    """Rotated queries, and a layer's cache with the keys and values of T tokens in its rows from `start + skip` on.

    Args:
      qkv: [T, (heads + 2 kv_heads) head_dim], the three side by side.
      by: how each token's queries and keys are rotated.
      keys, values: [kv_heads, S, head_dim], or with a slot [slots, kv_heads, S, head_dim]. Floats, or the bits of
        bfloat16 as uint16.
      start: int32. skip: known beforehand. The caller sees to it that the rows fit: XLA would otherwise shift the
        window back and overwrite rows before it.
      slot: int32, which part of a pool is this sequence's. Under vmap no two sequences may have the same one, unless
        nobody reads it.
      norms: what queries and keys go through first; None: nothing.
      implementation: see `dispatch`.

    Returns:
      Queries [T, heads, head_dim], keys, values.
    """
    implementation = resolve(implementation)
    run = functools.partial(triton.rotary_append, skip=skip, interpret=implementation == "interpret")
    if slot is None:
        if implementation == "xla":  # apart, since its update of a cache seen as a pool of one would copy the cache
            return xla.rotary_append(qkv, by, keys, values, start + skip, norms)
        q, keys, values = (x[0] for x in run(qkv[None], by.each(), keys[None], values[None], start[None], None, norms))
        return q, keys, values

    def each(pool: tuple[Array, Array], own: tuple[Array, Rotation, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        qkv, by, start, slot = own
        if implementation == "xla":
            q, keys, values = xla.in_slots(qkv, by, *pool, start + skip, slot, norms)
        else:
            q, keys, values = run(qkv, by, *pool, start, slot, norms)
        return q, (keys, values)

    q, (keys, values) = in_pool(each, (keys, values), (qkv, by, start, slot))
    return q, keys, values
