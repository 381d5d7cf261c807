"""Keys and values of the tokens seen so far: one pair of arrays a layer, updated in place.

The layers are a Python tuple, not one stacked array: XLA then updates every donated cache in place,
where a scan over a stack copies it (see tests/promises/test_no_copies.py, which reads the compiled program).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from frspec_jax.config import ModelConfig

BLOCK = 256  # capacities are multiples of it, so that attention may walk the cache in whole blocks


@struct.dataclass
class LayerKV:
    """One layer's cache. Row s holds the token at position s (or, past the committed rows, a tree node)."""

    keys: Array  # [kv_heads, S, head_dim], rotated; floats, or the bits of bfloat16 as uint16
    values: Array  # [kv_heads, S, head_dim]

    @property
    def capacity(self) -> int:
        return self.keys.shape[-2]


KVCache = tuple[LayerKV, ...]


def rounded_capacity(tokens: int) -> int:
    """The smallest allowed capacity that holds `tokens` rows."""
    return -(-tokens // BLOCK) * BLOCK


def stored(dtype: jnp.dtype) -> jnp.dtype:
    """What a cache keeps for weights of `dtype`: the same, but on a CPU bfloat16's bits, as integers.

    To update a bfloat16 array in place, XLA's CPU backend widens and narrows all of it, which took half of a pass.
    """
    bits = jax.default_backend() == "cpu" and dtype == jnp.bfloat16
    return jnp.dtype(jnp.uint16) if bits else dtype


def empty(config: ModelConfig, capacity: int, dtype: jnp.dtype) -> KVCache:
    """A zeroed cache of `capacity` rows (a multiple of `BLOCK`) for every layer; dtype: of the weights."""
    if capacity % BLOCK:
        raise ValueError(f"capacity {capacity} is not a multiple of {BLOCK}")
    shape, dtype = (config.num_kv_heads, capacity, config.head_dim), stored(dtype)
    return tuple(LayerKV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))


def write(cache: LayerKV, keys: Array, values: Array, start: Array) -> LayerKV:
    """Write rows `start` .. `start + T - 1`.

    keys, values: [T, kv_heads, head_dim]. The caller sees to it that the rows fit: XLA would
    otherwise shift the window back and overwrite committed rows.
    """
    at = (0, start, 0)
    return LayerKV(
        lax.dynamic_update_slice(cache.keys, _kept(keys.swapaxes(0, 1), cache.keys.dtype), at),
        lax.dynamic_update_slice(cache.values, _kept(values.swapaxes(0, 1), cache.values.dtype), at),
    )


def _kept(rows: Array, dtype: jnp.dtype) -> Array:
    """Rows as a cache of `dtype` keeps them."""
    return rows.astype(dtype) if dtype != jnp.uint16 else lax.bitcast_convert_type(rows.astype(jnp.bfloat16), dtype)


def compact(cache: KVCache, start: Array, path: Array) -> KVCache:
    """Move tree rows `start + path[k]` to `start + k`, so that an accepted path becomes committed.

    path: [D+1] node indices in the order of depth; path[0] is the root, which is in place already.
    Entries past the accepted length may be anything: the rows that they fill are written again by
    the next round.
    """
    if path.shape[0] == 1:
        return cache

    def moved(rows: Array) -> Array:
        accepted = jnp.take(rows, start + path[1:], axis=1)  # [kv_heads, D, head_dim]
        return lax.dynamic_update_slice(rows, accepted, (0, start + 1, 0))

    with jax.named_scope("compact"):
        return jax.tree.map(moved, cache)
