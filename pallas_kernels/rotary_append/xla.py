"""Rotation and the write to the cache in XLA: a few fusions, and one update in place for keys and for values."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from pallas_kernels.bits import bits_of


@struct.dataclass
class Rotation:
    """Cosine and sine of every rotated pair's angle, for the T tokens of a pass: one of it serves all layers."""

    cos_sin: Array  # [T, 1, head_dim] float32, all cosines and then all sines: one array is one launch

    @property
    def cos(self) -> Array:
        return self.cos_sin[..., : self.cos_sin.shape[-1] // 2]

    @property
    def sin(self) -> Array:
        return self.cos_sin[..., self.cos_sin.shape[-1] // 2 :]


def rotate(x: Array, by: Rotation) -> Array:
    """Rotary position embedding of x [T, heads, head_dim]: halves of head_dim form the pairs, as in Hugging Face."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * by.cos - b * by.sin, b * by.cos + a * by.sin], axis=-1).astype(x.dtype)


def rotary_append(qkv: Array, by: Rotation, keys: Array, values: Array, start: Array) -> tuple[Array, Array, Array]:
    """`pallas_kernels.rotary_append.rotary_append`; arguments and result as there."""
    kv_heads, head_dim = keys.shape[0], keys.shape[2]
    split = qkv.reshape(qkv.shape[0], -1, head_dim)
    heads = split.shape[1] - 2 * kv_heads
    rotated = rotate(split[:, : heads + kv_heads], by)
    keys = written(keys, rotated[:, heads:], start)
    return rotated[:, :heads], keys, written(values, split[:, heads + kv_heads :], start)


def written(cache: Array, rows: Array, start: Array) -> Array:
    """A cache [kv_heads, S, head_dim] with rows [T, kv_heads, head_dim] at `start`."""
    first = jnp.int32(0)
    return lax.dynamic_update_slice(cache, bits_of(rows.swapaxes(0, 1), cache.dtype), (first, start, first))
