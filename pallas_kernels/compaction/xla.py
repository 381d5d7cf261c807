"""Compaction in XLA: a gather and an update in place for each array."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def moved(arrays: list[Array], start: Array, path: Array, slot: Array | None) -> list[Array]:
    """The arrays [slots, kv_heads, S, head_dim] of `pallas_kernels.compaction.compact`.

    start: [B] int32. path: [B, D+1] int32. slot: [B] int32; None: B is 1, and so are the slots.
    """
    if slot is None or start.shape[0] == 1:
        return [_of_one(rows, start[0], path[0], jnp.int32(0) if slot is None else slot[0]) for rows in arrays]

    def one(number: Array, arrays: list[Array]) -> list[Array]:
        return [_of_one(rows, start[number], path[number], slot[number]) for rows in arrays]

    return lax.fori_loop(0, start.shape[0], one, arrays)


def _of_one(rows: Array, start: Array, path: Array, slot: Array) -> Array:
    if rows.shape[0] == 1:
        accepted = jnp.take(rows[0], start + path[1:], axis=1, mode="clip")  # [kv_heads, D, head_dim]
    else:
        accepted = rows.at[slot, :, start + path[1:]].get(mode="clip").swapaxes(0, 1)
    return lax.dynamic_update_slice(rows, accepted[None], (slot, jnp.int32(0), start + 1, jnp.int32(0)))
