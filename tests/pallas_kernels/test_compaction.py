"""An accepted path becomes committed, in the caches of all layers at once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.compaction import compact, triton

WAYS = ("xla", "interpret", "pallas") if jax.default_backend() == "gpu" else ("xla", "interpret")
moved = {how: jax.jit(functools.partial(compact, implementation=how)) for how in WAYS}
both = pytest.mark.parametrize("how", WAYS)
CAPACITY = 128


def filled(layers, head_dim=16, dtype=np.float32):
    rng = np.random.default_rng(layers)
    return [tuple(jnp.asarray(rng.normal(size=(2, 2, CAPACITY, head_dim)), dtype)) for _ in range(layers)]


def path_of(entries, nodes, length, rng):
    path = np.zeros(entries, np.int32)
    path[1:length] = np.sort(rng.choice(np.arange(1, nodes), length - 1, replace=False))
    return path


@both
@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(4, 8, 8), (7, 40, 80)]), st.integers(1, 3), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_a_path_of_any_length_moves(how, sizes, layers, seed, place):
    """The source rows are read before any is overwritten, though both ranges overlap."""
    entries, nodes, head_dim = sizes
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, entries + 1))
    path, start = path_of(entries, nodes, length, rng), round(place * (CAPACITY - nodes))
    before = filled(layers, head_dim)
    after = moved[how](before, jnp.int32(start), path)
    for old, new in zip(*(map(np.asarray, jax.tree.leaves(caches)) for caches in (before, after)), strict=True):
        for k in range(length):
            assert np.array_equal(new[:, start + k], old[:, start + path[k]])
        assert np.array_equal(new[:, :start], old[:, :start])
        assert np.array_equal(new[:, start + entries :], old[:, start + entries :])


def test_more_arrays_than_a_kernel_takes_are_more_launches(monkeypatch):
    monkeypatch.setattr(triton, "MOST_ARRAYS", 4)
    before, path = filled(3, 16, jnp.bfloat16), path_of(5, 20, 4, np.random.default_rng(0))
    after = compact(before, jnp.int32(9), path, implementation="interpret")
    expected = compact(before, jnp.int32(9), path, implementation="xla")
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        assert one.dtype == jnp.bfloat16 and np.array_equal(one[:, :13], other[:, :13])
