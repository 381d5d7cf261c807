"""The KV cache: rows are written where they belong, and an accepted path becomes committed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frspec_jax import kv_cache
from frspec_jax.kv_cache import BLOCK, LayerKV
from pallas_kernels import tree_attention
from tests.support import toy

CFG = toy.config()
SHAPE = (CFG.num_kv_heads, BLOCK, CFG.head_dim)
write = jax.jit(kv_cache.write)
compact = jax.jit(kv_cache.compact)


def filled(seed: int = 0) -> LayerKV:
    keys, values = np.random.default_rng(seed).normal(size=(2, *SHAPE)).astype(np.float32)
    return LayerKV(keys, values)


@pytest.mark.parametrize(("backend", "kept"), [("cpu", jnp.uint16), ("gpu", jnp.bfloat16)])
def test_an_empty_cache_has_a_pair_of_arrays_a_layer(backend, kept, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    cache = kv_cache.empty(CFG, 2 * BLOCK, jnp.bfloat16)
    assert len(cache) == CFG.num_layers and cache[0].capacity == 2 * BLOCK
    for array in jax.tree.leaves(cache):
        assert array.shape == (CFG.num_kv_heads, 2 * BLOCK, CFG.head_dim)
        assert array.dtype == kept and not array.any()


@given(st.integers(1, 10**6))
def test_capacities_are_the_next_multiple_of_a_block(tokens):
    capacity = kv_cache.rounded_capacity(tokens)
    assert capacity % BLOCK == 0 and capacity - BLOCK < tokens <= capacity


@pytest.mark.parametrize("capacity", [1, BLOCK - 1, BLOCK + 1, 1000])
def test_other_capacities_are_refused(capacity):
    with pytest.raises(ValueError, match=f"capacity {capacity} is not a multiple of {BLOCK}"):
        kv_cache.empty(CFG, capacity, jnp.float32)


def test_the_kernels_blocks_divide_every_capacity():
    assert BLOCK % tree_attention.BLOCK == 0


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 5, 64]), st.floats(0, 1), st.integers(0, 99))
def test_write_fills_its_rows_and_no_others(tokens, place, seed):
    start = round(place * (BLOCK - tokens))
    before = filled()
    rows = np.random.default_rng(seed).normal(size=(2, tokens, CFG.num_kv_heads, CFG.head_dim)).astype(np.float32)
    after = write(before, *rows, jnp.int32(start))
    for old, new, written in zip(jax.tree.leaves(before), jax.tree.leaves(after), rows, strict=True):
        expected = old.copy()
        for t in range(tokens):
            expected[:, start + t] = written[t]
        assert np.array_equal(new, expected)


def test_write_rounds_to_the_caches_dtype():
    cache = jax.tree.map(lambda rows: rows.astype(jnp.bfloat16), filled())
    rows = np.random.default_rng(0).normal(size=(2, 3, CFG.num_kv_heads, CFG.head_dim)).astype(np.float32)
    after = write(cache, *rows, jnp.int32(7))
    assert after.keys.dtype == after.values.dtype == jnp.bfloat16
    assert np.array_equal(after.keys[:, 8], jnp.asarray(rows[0, 1], jnp.bfloat16))


def test_write_keeps_the_bits_of_bfloat16():
    """As on a CPU; what is read of them is the same to the bit."""
    cache = jax.tree.map(lambda rows: jnp.zeros(rows.shape, jnp.uint16), filled())
    rows = np.random.default_rng(0).normal(size=(2, 3, CFG.num_kv_heads, CFG.head_dim)).astype(np.float32)
    after = write(cache, *rows, jnp.int32(7))
    found = jax.lax.bitcast_convert_type(after.values[:, 7:10], jnp.bfloat16)
    assert np.array_equal(found, jnp.asarray(rows[1], jnp.bfloat16).swapaxes(0, 1))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(4, 8), (7, 40)]), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_compact_moves_a_path_of_any_length(sizes, seed, place):
    """The source rows are read before any is overwritten, though both ranges overlap."""
    entries, nodes = sizes
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, entries + 1))
    path = np.zeros(entries, np.int32)
    path[1:length] = np.sort(rng.choice(np.arange(1, nodes), length - 1, replace=False))
    start = round(place * (BLOCK - nodes))
    before = (filled(1), filled(2))
    after = compact(before, jnp.int32(start), path)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        for k in range(length):
            assert np.array_equal(new[:, start + k], old[:, start + path[k]])
        assert np.array_equal(new[:, :start], old[:, :start])
        assert np.array_equal(new[:, start + entries :], old[:, start + entries :])


def test_a_tree_of_the_root_alone_has_nothing_to_move():
    before = (filled(),)
    assert kv_cache.compact(before, jnp.int32(3), jnp.zeros(1, jnp.int32)) is before
