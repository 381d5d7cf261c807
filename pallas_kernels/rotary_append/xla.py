"""Rotation and the write to the cache in XLA: a few fusions, and one update in place for keys and for values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from pallas_kernels.bits import bits_of
from pallas_kernels.products import rms_norm


@struct.dataclass
class Rotation:
    """Cosine and sine of every rotated pair's angle, for the T tokens of a pass: one of it serves all layers."""

    cos_sin: Array  # [..., T, 1, head_dim] float32, all cosines and then all sines: one array is one launch

    @property
    def cos(self) -> Array:
        return self.cos_sin[..., : self.cos_sin.shape[-1] // 2]

    @property
    def sin(self) -> Array:
        return self.cos_sin[..., self.cos_sin.shape[-1] // 2 :]

    def each(self) -> Rotation:
        """The same as that of a batch of one."""
        return Rotation(self.cos_sin[None])


@struct.dataclass
class Place:
    """Which rows of a cache are written: those from `start + skip` on, of the sequence's part of a pool if it has one.

    The caller sees to it that the rows fit: XLA would otherwise shift the window back and overwrite rows before it.
    """

    start: Array  # int32; of a batch [B]
    # int32, of a batch [B]: which part of a pool is the sequence's. Under vmap no two sequences may have the same one,
    # unless nobody reads it. None: there is no pool.
    slot: Array | None = None
    skip: int = struct.field(pytree_node=False, default=0)

    @property
    def first(self) -> Array:
        """The first row that is written: int32, of a batch [B]."""
        return self.start + self.skip

    def each(self) -> Place:
        """The same as that of a batch of one."""
        return jax.tree.map(lambda x: x[None], self)


@struct.dataclass
class HeadNorms:
    """Norms of each head's query and key, before they are rotated (Qwen3, Gemma 3)."""

    query: Array  # [head_dim]
    key: Array  # [head_dim]
    eps: float = struct.field(pytree_node=False)
    offset: float = struct.field(pytree_node=False, default=0.0)  # added to the weights

    def __call__(self, split: Array, heads: int, kv_heads: int) -> Array:
        """Heads [..., heads + 2 kv_heads, head_dim], queries first, then keys, and the values as they are."""
        parts = jnp.split(split, (heads, heads + kv_heads), axis=-2)
        normed = (rms_norm(x, w, self.eps, self.offset) for x, w in zip(parts, (self.query, self.key), strict=False))
        return jnp.concatenate([*normed, parts[2]], axis=-2)


def rotate(x: Array, by: Rotation) -> Array:
    """Rotary position embedding of x [..., T, heads, head_dim]: halves of head_dim form pairs, as in Hugging Face."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * by.cos - b * by.sin, b * by.cos + a * by.sin], axis=-1).astype(x.dtype)


def rotary_append(
    qkv: Array, by: Rotation, keys: Array, values: Array, place: Place, norms: HeadNorms | None
) -> tuple[Array, Array, Array]:
    """`pallas_kernels.rotary_append.rotary_append` of one sequence without a pool; arguments and result as there."""
    start, kv_heads, head_dim = place.first, keys.shape[0], keys.shape[2]
    split = qkv.reshape(qkv.shape[0], -1, head_dim)
    heads = split.shape[1] - 2 * kv_heads
    split = split if norms is None else norms(split, heads, kv_heads)
    rotated = rotate(split[:, : heads + kv_heads], by)
    keys = written(keys, rotated[:, heads:], start)
    return rotated[:, :heads], keys, written(values, split[:, heads + kv_heads :], start)


def written(cache: Array, rows: Array, start: Array) -> Array:
    """A cache [kv_heads, S, head_dim] with rows [T, kv_heads, head_dim] at `start`."""
    first = jnp.int32(0)
    return lax.dynamic_update_slice(cache, bits_of(rows.swapaxes(0, 1), cache.dtype), (first, start, first))


def in_slots(
    qkv: Array, by: Rotation, keys: Array, values: Array, place: Place, norms: HeadNorms | None
) -> tuple[Array, Array, Array]:
    """The same of B sequences in a pool: each argument with an axis for them.

    keys, values: [slots, kv_heads, S, head_dim].
    """
    assert place.slot is not None
    start, slot = place.first, place.slot
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    split = qkv.reshape(*qkv.shape[:2], -1, head_dim)
    heads = split.shape[2] - 2 * kv_heads
    split = split if norms is None else norms(split, heads, kv_heads)
    rotated = rotate(split[:, :, : heads + kv_heads], by)
    keys = _in_slots(keys, rotated[:, :, heads:], start, slot)
    return rotated[:, :, :heads], keys, _in_slots(values, split[:, :, heads + kv_heads :], start, slot)


def _in_slots(cache: Array, rows: Array, start: Array, slot: Array) -> Array:
    """A pool [slots, kv_heads, S, head_dim] with rows [B, T, kv_heads, head_dim] of B sequences, from `start` [B]."""
    zero = jnp.int32(0)
    rows = bits_of(rows.swapaxes(1, 2), cache.dtype)
    if rows.shape[0] == 1:
        return lax.dynamic_update_slice(cache, rows, (slot[0], zero, start[0], zero))

    def one(number: Array, cache: Array) -> Array:
        # A loop, since XLA makes of many writes at once one that it cannot do in place.
        row = lax.dynamic_slice_in_dim(rows, number, 1)
        return lax.dynamic_update_slice(cache, row, (slot[number], zero, start[number], zero))

    return jax.lax.fori_loop(0, rows.shape[0], one, cache)
