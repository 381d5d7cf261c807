"""Rows of bfloat16 kept as their bits, as a CPU's caches keep them (`frspec_jax.kv_cache.stored`)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def floats_of(rows: Array) -> Array:
    """Rows of a cache as floats: those of bfloat16 may be kept as their bits."""
    return lax.bitcast_convert_type(rows, jnp.bfloat16) if rows.dtype == jnp.uint16 else rows


def bits_of(rows: Array, dtype: jnp.dtype) -> Array:
    """Rows as a cache of `dtype` keeps them: floats of its kind, or the bits of bfloat16."""
    return rows.astype(dtype) if dtype != jnp.uint16 else lax.bitcast_convert_type(rows.astype(jnp.bfloat16), dtype)
