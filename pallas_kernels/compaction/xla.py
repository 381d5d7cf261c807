"""Compaction in XLA: a gather and an update in place for each array."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def moved(rows: Array, start: Array, path: Array) -> Array:
    """One array [kv_heads, S, head_dim] of `pallas_kernels.compaction.compact`."""
    accepted = jnp.take(rows, start + path[1:], axis=1, mode="clip")  # [kv_heads, D, head_dim]
    return lax.dynamic_update_slice(rows, accepted, (jnp.int32(0), start + 1, jnp.int32(0)))


def in_slots(arrays: list[Array], start: Array, path: Array, slot: Array) -> list[Array]:
    """The same of pools [slots, kv_heads, S, head_dim], of B sequences.

    start, slot: [B] int32. path: [B, D+1] int32.
    """
    if start.shape[0] == 1:
        return [_of_one(rows, start[0], path[0], slot[0]) for rows in arrays]

    def one(number: Array, arrays: list[Array]) -> list[Array]:
        return [_of_one(rows, start[number], path[number], slot[number]) for rows in arrays]

    return lax.fori_loop(0, start.shape[0], one, arrays)


def _of_one(rows: Array, start: Array, path: Array, slot: Array) -> Array:
    accepted = rows.at[slot, :, start + path[1:]].get(mode="clip").swapaxes(0, 1)  # [kv_heads, D, head_dim]
    return lax.dynamic_update_slice(rows, accepted[None], (slot, jnp.int32(0), start + 1, jnp.int32(0)))
