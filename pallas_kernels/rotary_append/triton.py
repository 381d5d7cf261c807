"""Rotation and the write to the cache as one Pallas kernel for CUDA (Triton), a program for a head of some tokens."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.bits import bits_of, floats_of
from pallas_kernels.dispatch import power_of_two
from pallas_kernels.rotary_append.xla import HeadNorms, Place, Rotation

MOST_TOKENS = 32  # a program


@functools.partial(jax.jit, static_argnames="interpret")  # equal layers are lowered once
def rotary_append(
    qkv: Array,
    by: Rotation,
    keys: Array,
    values: Array,
    place: Place,
    norms: HeadNorms | None,
    *,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """`xla.in_slots`, by the kernel; arguments and result as there; no slot: one sequence, in a pool of one."""
    (batch, tokens, width), (_, kv_heads, _, head_dim) = qkv.shape, keys.shape
    slot = jnp.zeros(batch, jnp.int32) if place.slot is None else place.slot
    heads = width // head_dim - 2 * kv_heads
    block = min(MOST_TOKENS, power_of_two(tokens, least=1))
    learned = () if norms is None else (norms.query, norms.key)
    scaling = None if norms is None else (norms.eps, norms.offset)
    kernel = functools.partial(_kernel, heads=heads, block=block, skip=place.skip, scaling=scaling)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    k, v = floats_of(keys), floats_of(values)
    q, k, v = pl.pallas_call(
        kernel,
        grid=(heads + 2 * kv_heads, -(-tokens // block), batch),
        in_specs=[whole] * (6 + len(learned)),
        out_specs=[whole] * 3,
        out_shape=[
            jax.ShapeDtypeStruct((batch, tokens, heads, head_dim), qkv.dtype),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        input_output_aliases={4: 1, 5: 2},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rotary_append",
    )(qkv, by.cos_sin[:, :, 0], place.start, slot, k, v, *learned)
    return q, bits_of(k, keys.dtype), bits_of(v, values.dtype)


def _kernel(*refs: Any, heads: int, block: int, skip: int, scaling: tuple[float, float] | None) -> None:
    """One head of `block` tokens. The caches come twice, as what is read and as what is written: they are the same.

    scaling: eps and offset of the heads' norms, whose two weights [head_dim] come too; None: there are none.
    """
    qkv_ref, cos_sin_ref, start_ref, slot_ref, _keys, _values, *learned, q_ref, keys_ref, values_ref = refs
    tokens, half, kv_heads = cos_sin_ref.shape[1], cos_sin_ref.shape[2] // 2, keys_ref.shape[1]
    sequence = pl.program_id(2)
    head, token = pl.program_id(0), pl.program_id(1) * block + lax.iota(jnp.int32, block)
    pair = lax.iota(jnp.int32, power_of_two(half, least=1))
    real = (token < tokens)[:, None] & (pair < half)[None]
    row, low = jnp.broadcast_to(token[:, None], real.shape), jnp.broadcast_to(pair[None], real.shape)
    text = jnp.broadcast_to(sequence, real.shape)
    first = head * 2 * half + low
    a = plt.load(qkv_ref.at[text, row, first], mask=real, other=0)
    b = plt.load(qkv_ref.at[text, row, first + half], mask=real, other=0)
    cos = plt.load(cos_sin_ref.at[text, row, low], mask=real, other=0.0)
    sin = plt.load(cos_sin_ref.at[text, row, low + half], mask=real, other=0.0)
    a32, b32 = a.astype(jnp.float32), b.astype(jnp.float32)
    if scaling is not None:
        (query_ref, key_ref), (eps, offset) = learned, scaling
        scale = lax.rsqrt((a32 * a32 + b32 * b32).sum(1) / (2 * half) + eps)[:, None]

        def weight(at: int) -> Array:
            """A query's or a key's. (Values are neither normed nor rotated: what becomes of them is not stored.)"""
            inside = pair < half
            query, key = (plt.load(ref.at[pair + at], mask=inside, other=0) for ref in (query_ref, key_ref))
            return jnp.where(jnp.broadcast_to(head < heads, pair.shape), query, key)

        a32, b32 = (_normed(x, scale, weight(at), offset, a.dtype) for x, at in ((a32, 0), (b32, half)))
    turned = (a32 * cos - b32 * sin).astype(a.dtype), (b32 * cos + a32 * sin).astype(b.dtype)

    at = start_ref[sequence] + skip + row
    slot = jnp.broadcast_to(slot_ref[sequence], real.shape)
    key, value = head - heads, head - heads - kv_heads
    for number, (plain, rotated) in enumerate(zip((a, b), turned, strict=True)):
        column = low + number * half
        is_query, is_value = head < heads, value >= 0
        query = jnp.broadcast_to(jnp.minimum(head, heads - 1), real.shape)
        plt.store(q_ref.at[text, row, query, column], rotated.astype(q_ref.dtype), mask=real & is_query)
        mine = jnp.broadcast_to(jnp.clip(key, 0, kv_heads - 1), real.shape)
        is_key = (key >= 0) & (value < 0)
        plt.store(keys_ref.at[slot, mine, at, column], rotated.astype(keys_ref.dtype), mask=real & is_key)
        mine = jnp.broadcast_to(jnp.clip(value, 0, kv_heads - 1), real.shape)
        plt.store(values_ref.at[slot, mine, at, column], plain.astype(values_ref.dtype), mask=real & is_value)


def _normed(x: Array, scale: Array, weight: Array, offset: float, dtype: Any) -> Array:
    """`products.rms_norm` of float32 x [T, pairs], rounded as there."""
    if offset:
        rounded = (x * scale * (weight.astype(jnp.float32) + offset)[None]).astype(dtype)
    else:
        rounded = (x * scale).astype(dtype) * weight[None]
    return rounded.astype(jnp.float32)
