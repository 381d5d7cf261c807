"""Keys and values of the tokens seen so far: one pair of arrays a layer, updated in place.

The layers are a Python tuple, not one stacked array: XLA then updates every donated cache in place,
where a scan over a stack copies it (see tests/promises/test_no_copies.py, which reads the compiled program).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array

from frspec_jax.config import ModelConfig
from frspec_jax.placement import Placement
from pallas_kernels import device
from pallas_kernels.compaction import compact as compacted
from pallas_kernels.dispatch import Implementation
from pallas_kernels.rotary_append import HeadNorms, Place, Rotation
from pallas_kernels.rotary_append import rotary_append as rotate_and_append

BLOCK = 256  # capacities are multiples of it, so that attention may walk the cache in whole blocks


@struct.dataclass
class LayerKV:
    """One layer's cache. Row s holds the token at position s (or, past the committed rows, a tree node).

    Several sequences may share a pool, of which each owns a slot: then the arrays are [slots, kv_heads, S, head_dim].
    """

    keys: Array  # [kv_heads, S, head_dim], rotated; floats, or the bits of bfloat16 as uint16
    values: Array  # [kv_heads, S, head_dim]
    slot: Array | None = None  # int32, the part of a pool that is meant; None: there is but one sequence

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
    bits = device.current().platform == "cpu" and dtype == jnp.bfloat16
    return jnp.dtype(jnp.uint16) if bits else dtype


def empty(config: ModelConfig, capacity: int, dtype: jnp.dtype, kv_heads: int | None = None) -> KVCache:
    """A zeroed cache of `capacity` rows (a multiple of `BLOCK`) for every layer.

    dtype: of the weights. kv_heads: of all devices together, where that is not the model's number.
    """
    if capacity % BLOCK:
        raise ValueError(f"capacity {capacity} is not a multiple of {BLOCK}")
    shape, dtype = (kv_heads or config.num_kv_heads, capacity, config.head_dim), stored(dtype)
    return tuple(LayerKV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))


def rotary_append(
    cache: LayerKV,
    qkv: Array,
    by: Rotation,
    where: Placement,
    norms: HeadNorms | None = None,
    implementation: Implementation = "auto",
) -> tuple[Array, LayerKV]:
    """Rotated queries [T, heads, head_dim], and the cache with what T tokens bring (`pallas_kernels.rotary_append`)."""
    q, keys, values = rotate_and_append(
        qkv,
        by,
        cache.keys,
        cache.values,
        Place(where.write_at, cache.slot, where.skip),
        norms=norms,
        implementation=implementation,
    )
    return q, LayerKV(keys, values, cache.slot)


def compact(cache: KVCache, start: Array, path: Array, implementation: Implementation = "auto") -> KVCache:
    """Move tree rows `start + path[k]` to `start + k`, so that an accepted path becomes committed.

    path: [D+1] node indices in the order of depth; path[0] is the root, which is in place already.
    Entries past the accepted length may be anything: the rows that they fill are written again by
    the next round.
    """
    if path.shape[0] == 1:
        return cache
    arrays = [(layer.keys, layer.values) for layer in cache]
    moved = compacted(arrays, start, path, slot=cache[0].slot, implementation=implementation)
    return tuple(LayerKV(*pair, layer.slot) for pair, layer in zip(moved, cache, strict=True))
