"""Rotation and the write to the cache: rows are written where they belong, and nowhere else."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.products import rms_norm
from pallas_kernels.rotary_append import HeadNorms, Place, Rotation, rotary_append, rotate, written

WAYS = ("xla", "interpret", "pallas") if jax.default_backend() == "gpu" else ("xla", "interpret")
append = {how: jax.jit(functools.partial(rotary_append, implementation=how)) for how in WAYS}
both = pytest.mark.parametrize("how", WAYS)
CAPACITY = 128
# tokens, heads, KV heads, head_dim
SHAPES = [(1, 4, 2, 8), (5, 6, 2, 80), (60, 8, 8, 16), (33, 9, 3, 64), (10, 4, 1, 96), (64, 2, 2, 256)]


def case(shape, dtype=np.float32, seed=0):
    tokens, heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(seed)
    qkv = jnp.asarray(rng.normal(size=(tokens, (heads + 2 * kv_heads) * head_dim)), dtype)
    angle = rng.normal(size=(tokens, 1, head_dim // 2))
    by = Rotation(jnp.asarray(np.concatenate([np.cos(angle), np.sin(angle)], -1), jnp.float32))
    keys, values = jnp.asarray(rng.normal(size=(2, kv_heads, CAPACITY, head_dim)), dtype)
    return qkv, by, keys, values


@both
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SHAPES), st.floats(0, 1), st.sampled_from([0, 10, 30]), st.integers(0, 99))
def test_rows_are_rotated_and_written_where_they_belong(how, shape, place, skip, seed):
    tokens, heads, kv_heads, head_dim = shape
    start = round(place * (CAPACITY - tokens - skip))
    qkv, by, keys, values = case(shape, seed=seed)
    q, new_keys, new_values = append[how](qkv, by, keys, values, Place(jnp.int32(start), skip=skip))

    plain = np.asarray(qkv, np.float64).reshape(tokens, -1, head_dim)
    cos, sin = np.asarray(by.cos, np.float64), np.asarray(by.sin, np.float64)
    a, b = np.split(plain, 2, axis=-1)
    turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    np.testing.assert_allclose(q, turned[:, :heads], atol=2e-6)
    rows = slice(start + skip, start + skip + tokens)
    expected_keys, expected_values = np.array(keys, np.float64), np.array(values, np.float64)
    expected_keys[:, rows] = turned[:, heads : heads + kv_heads].swapaxes(0, 1)
    expected_values[:, rows] = plain[:, heads + kv_heads :].swapaxes(0, 1)
    np.testing.assert_allclose(new_keys, expected_keys, atol=2e-6)
    assert np.array_equal(new_values, expected_values)
    untouched = np.ones(CAPACITY, bool)
    untouched[rows] = False
    assert np.array_equal(np.asarray(new_keys)[:, untouched], np.asarray(keys)[:, untouched])


@both
def test_bfloat16_is_rounded_once_and_its_bits_may_be_kept(how):
    """As on a CPU, whose caches keep them as integers; what is read of them is the same to the bit."""
    qkv, by, keys, values = case((7, 4, 2, 16), jnp.bfloat16)
    floats = append[how](qkv, by, keys, values, Place(jnp.int32(3)))
    bits = append[how](qkv, by, keys.view(jnp.uint16), values.view(jnp.uint16), Place(jnp.int32(3)))
    assert [x.dtype for x in floats] == 3 * [jnp.bfloat16] and bits[1].dtype == bits[2].dtype == jnp.uint16
    assert all(np.array_equal(x, y.view(jnp.bfloat16)) for x, y in zip(floats, bits, strict=True))
    assert np.array_equal(floats[2][:, 3:10], qkv.reshape(7, -1, 16)[:, 6:].swapaxes(0, 1))


@pytest.mark.sweep(quick=["0.0-float32-*", "1.0-bfloat16-*"])
@both
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_heads_are_normed_before_they_are_rotated(how, offset, dtype):
    for shape in SHAPES[1:5]:
        tokens, heads, kv_heads, head_dim = shape
        qkv, by, keys, values = case(shape, dtype)
        query, key = jnp.asarray(np.random.default_rng(1).normal(size=(2, head_dim)), dtype)
        norms = HeadNorms(query, key, 1e-6, offset)
        q, new_keys, new_values = append[how](qkv, by, keys, values, Place(jnp.int32(9)), norms=norms)
        split = qkv.reshape(tokens, -1, head_dim)
        by_hand = [
            rotate(rms_norm(x, weight, 1e-6, offset), by)
            for x, weight in ((split[:, :heads], query), (split[:, heads : heads + kv_heads], key))
        ]
        near = functools.partial(np.testing.assert_allclose, atol=1e-5 if dtype == jnp.float32 else 0.04, rtol=2e-2)
        near(np.asarray(q, np.float32), np.asarray(by_hand[0], np.float32))
        near(np.asarray(new_keys[:, 9 : 9 + tokens].swapaxes(0, 1), np.float32), np.asarray(by_hand[1], np.float32))
        assert np.array_equal(new_values[:, 9 : 9 + tokens].swapaxes(0, 1), split[:, heads + kv_heads :])


def test_written_rounds_to_the_caches_dtype():
    rows = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
    after = written(jnp.zeros((2, 32, 8), jnp.bfloat16), jnp.asarray(rows), jnp.int32(7))
    assert after.dtype == jnp.bfloat16 and np.array_equal(after[:, 8], jnp.asarray(rows[1], jnp.bfloat16))
