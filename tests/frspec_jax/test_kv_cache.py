"""The KV cache: rows are written where they belong, and an accepted path becomes committed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frspec_jax import kv_cache
from frspec_jax.kv_cache import BLOCK, LayerKV
from pallas_kernels import device, tree_attention
from tests.support import toy

CFG = toy.config()
SHAPE = (CFG.num_kv_heads, BLOCK, CFG.head_dim)


def filled(seed: int = 0) -> LayerKV:
    keys, values = np.random.default_rng(seed).normal(size=(2, *SHAPE)).astype(np.float32)
    return LayerKV(keys, values)


@pytest.mark.parametrize(("backend", "kept"), [("cpu", jnp.uint16), ("gpu", jnp.bfloat16)])
def test_an_empty_cache_has_a_pair_of_arrays_a_layer(backend, kept):
    with device.compiling_for(device.Device(backend, "one of them")):
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


def test_a_tree_of_the_root_alone_has_nothing_to_move():
    before = (filled(),)
    assert kv_cache.compact(before, jnp.int32(3), jnp.zeros(1, jnp.int32)) is before
