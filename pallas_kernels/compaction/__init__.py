"""Commit an accepted path: its rows move together in the caches of every layer."""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
from jax import Array

from pallas_kernels.batching import in_pool
from pallas_kernels.compaction import triton, xla
from pallas_kernels.dispatch import Implementation, resolve

__all__ = ["compact"]

Caches = TypeVar("Caches")


def compact(
    caches: Caches, start: Array, path: Array, *, slot: Array | None = None, implementation: Implementation = "auto"
) -> Caches:
    """Move tree rows `start + path[k]` to `start + k`.

    Args:
      caches: a pytree of arrays [kv_heads, S, head_dim], or with a slot [slots, kv_heads, S, head_dim], of one shape.
      start: int32, the root's row. path: [D+1] int32, node indices in the order of depth; path[0] is the root, which
        is in place already. They ascend as far as the path goes; past its end they may be anything, and so may be the
        rows that they fill.
      slot: int32, which part of a pool is this sequence's.
      implementation: see `dispatch`.
    """
    if path.shape[0] == 1:
        return caches
    implementation = resolve(implementation)
    in_triton = functools.partial(triton.moved, interpret=implementation == "interpret")
    in_slots = xla.in_slots if implementation == "xla" else in_triton
    with jax.named_scope("compact"):
        arrays, tree = jax.tree.flatten(caches)
        if slot is None:
            if implementation == "xla":  # apart, since its update of a cache seen as a pool of one would copy the cache
                return jax.tree.unflatten(tree, [xla.moved(rows, start, path) for rows in arrays])
            after = in_triton([rows[None] for rows in arrays], start[None], path[None], None)
            return jax.tree.unflatten(tree, [rows[0] for rows in after])

        def each(pool: list[Array], own: tuple[Array, Array, Array], _: None) -> tuple[tuple[()], list[Array]]:
            return (), in_slots(pool, *own)

        return jax.tree.unflatten(tree, in_pool(each, arrays, (start, path, slot))[1])
