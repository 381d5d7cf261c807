"""Long prompts run in long chunks, and what is left of them in short ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frspec_jax.kv_cache import BLOCK, rounded_capacity
from frspec_jax.prefill import Chunks

PAIRS = [Chunks(64, 512), Chunks(64), Chunks(256), Chunks(8, 32), Chunks(1, 5)]


@given(st.sampled_from(PAIRS), st.integers(1, 5000), st.integers(0, 3 * BLOCK))
def test_they_cover_the_prompt_and_fit_the_cache(chunks, length, more):
    capacity = rounded_capacity(length + more)
    sizes = chunks.sizes(length, capacity)
    assert set(sizes) <= {chunks.short, chunks.long} and sizes == sorted(sizes, reverse=True)
    assert sum(sizes[:-1]) < length <= sum(sizes) <= capacity


@pytest.mark.parametrize(
    ("length", "capacity", "sizes"),
    [
        (1, 4096, [64]),
        (341, 4096, 6 * [64]),
        (342, 4096, [512]),  # padded, it costs less than six short ones
        (342, 500 // BLOCK * BLOCK + BLOCK, [512]),
        (250, 256, 4 * [64]),
        (400, 512, [512]),
        (700, 768, [512, 64, 64, 64]),  # a second one would not fit
        (1480, 4096, [512, 512, 512]),
        (1100, 4096, [512, 512, 64, 64]),
    ],
)
def test_a_long_one_is_taken_where_it_pays(length, capacity, sizes):
    assert Chunks(64, 512).sizes(length, capacity) == sizes


def test_one_size_alone():
    assert Chunks(256).sizes(1000, 4096) == 4 * [256]
