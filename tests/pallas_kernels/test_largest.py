"""`pallas_kernels.largest` against XLA's own operations: the same places, whatever is equal and whatever is masked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from pallas_kernels import largest

SIZES = (7, 2048, 8192, 8193, 12288, 50257)  # below what is worth two steps; whole blocks; and a last one that is not


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SIZES), st.integers(1, 5), st.integers(1, 7), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_the_largest_as_xla_finds_them(size, rows, k, levels, seed):
    random = np.random.default_rng(seed)
    x = random.integers(0, levels, (rows, size)).astype(np.float32)  # few levels: many are equal
    x[random.random(x.shape) < random.choice([0, 0.5, 0.999])] = -np.inf
    values, places = largest.top_k(jnp.asarray(x), k)
    expected, at = lax.top_k(x, k)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(places, at)
    np.testing.assert_array_equal(largest.argmax(jnp.asarray(x)), np.argmax(x, -1))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_rows_that_no_model_gives(value):
    x = np.zeros((2, 9000), np.float32)
    x[0, 8999] = value
    x[1] = value
    np.testing.assert_array_equal(largest.argmax(jnp.asarray(x)), lax.argmax(jnp.asarray(x), 1, jnp.int32))


def test_under_vmap_as_alone():
    x = jax.random.normal(jax.random.key(0), (3, 2, 9000))
    np.testing.assert_array_equal(jax.vmap(largest.argmax)(x), largest.argmax(x))
    for mine, alone in zip(jax.vmap(lambda x: largest.top_k(x, 4))(x), largest.top_k(x, 4), strict=True):
        np.testing.assert_array_equal(mine, alone)
