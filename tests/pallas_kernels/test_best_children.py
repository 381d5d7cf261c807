"""The next beams: the best children by a stable sort, and whose rows they see."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.best_children import best_children

WAYS = ("xla", "interpret", "pallas") if jax.default_backend() == "gpu" else ("xla", "interpret")
choose = {how: jax.jit(functools.partial(best_children, implementation=how)) for how in WAYS}


@pytest.mark.parametrize("how", WAYS)
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, 1), (3, 1), (4, 2), (10, 2), (16, 3)]), st.integers(0, 2**32 - 1), st.sampled_from([2, 1000])
)
def test_they_are_those_of_a_stable_sort(how, sizes, seed, steps):
    """Few distinct scores make many ties, and some children are impossible (-inf)."""
    k, words = sizes
    rng = np.random.default_rng(seed)
    beams = rng.integers(-steps, 1, k).astype(np.float32)
    scores = rng.integers(-steps, 1, (k, k)).astype(np.float32)
    scores[rng.random((k, k)) < 0.2] = -np.inf
    tokens = rng.integers(0, 10**6, (k, k)).astype(np.int32)
    sees, own = rng.integers(-(2**31), 2**31, (2, k, words)).astype(np.int32)
    found = choose[how](*map(jnp.asarray, (beams, scores, tokens, sees, own)))
    every = (beams[:, None] + scores).reshape(-1)
    order = np.argsort(-every, kind="stable")[:k]
    assert np.array_equal(found.number, order) and np.array_equal(found.tokens, tokens.reshape(-1)[order])
    assert np.array_equal(found.scores, every[order]) and np.array_equal(found.every, every)
    assert np.array_equal(found.sees, sees[order // k] | own)
