"""What stands between the product for Q, K and V and attention: rotate queries and keys, write keys and values.

The caches are updated in place: to XLA they are arguments that a launch may overwrite.
"""

from __future__ import annotations

import functools

from jax import Array

from pallas_kernels.batching import in_pool
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.rotary_append import triton, xla
from pallas_kernels.rotary_append.xla import HeadNorms, Place, Rotation, rotate, written

__all__ = ["HeadNorms", "Place", "Rotation", "rotary_append", "rotate", "written"]


def rotary_append(
    qkv: Array,
    by: Rotation,
    keys: Array,
    values: Array,
    place: Place,
    *,
    norms: HeadNorms | None = None,
    implementation: Implementation = "auto",
) -> tuple[Array, Array, Array]:
    """Rotated queries, and a layer's cache with the keys and values of T tokens in the rows of a place.

    Args:
      qkv: [T, (heads + 2 kv_heads) head_dim], the three side by side.
      by: how each token's queries and keys are rotated.
      keys, values: [kv_heads, S, head_dim], or with a slot [slots, kv_heads, S, head_dim]. Floats, or the bits of
        bfloat16 as uint16.
      place: the rows that are written.
      norms: what queries and keys go through first; None: nothing.
      implementation: see `dispatch`.

    Returns:
      Queries [T, heads, head_dim], keys, values.
    """
    implementation = resolve(implementation)
    run = functools.partial(triton.rotary_append, interpret=implementation == "interpret")
    if place.slot is None:
        if implementation == "xla":  # apart, since its update of a cache seen as a pool of one would copy the cache
            return xla.rotary_append(qkv, by, keys, values, place, norms)
        q, keys, values = (x[0] for x in run(qkv[None], by.each(), keys[None], values[None], place.each(), norms))
        return q, keys, values

    in_slots = xla.in_slots if implementation == "xla" else run

    def each(
        pool: tuple[Array, Array], own: tuple[Array, Rotation, Place], norms: HeadNorms | None
    ) -> tuple[Array, tuple[Array, Array]]:
        qkv, by, place = own
        q, keys, values = in_slots(qkv, by, *pool, place, norms)
        return q, (keys, values)

    q, (keys, values) = in_pool(each, (keys, values), (qkv, by, place), norms)
    return q, keys, values
