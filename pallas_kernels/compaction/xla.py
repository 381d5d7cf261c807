"""Compaction in XLA: a gather and an update in place for each array."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def moved(rows: Array, start: Array, path: Array) -> Array:
    """One array [kv_heads, S, head_dim] of `pallas_kernels.compaction.compact`."""
    accepted = jnp.take(rows, start + path[1:], axis=1, mode="clip")  # [kv_heads, D, head_dim]
    return lax.dynamic_update_slice(rows, accepted, (jnp.int32(0), start + 1, jnp.int32(0)))
