"""The draft's head: log-softmax and top-k over the sub-vocabulary, against numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.subvocab_head import Extra, quantised, subvocab_top_k

pytestmark = pytest.mark.as_shipped
WAYS = ("xla", "interpret", "pallas") if jax.default_backend() == "gpu" else ("xla", "interpret")
top = {how: jax.jit(functools.partial(subvocab_top_k, implementation=how), static_argnames="k") for how in WAYS}
both = pytest.mark.parametrize("how", list(top))


def reference(x, head, k) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities [M, k] and indices [M, k] by a stable sort, and all log-probabilities [M, V'], in float64."""
    logits = np.asarray(x, np.float64) @ np.asarray(head, np.float64).T
    peak = logits.max(-1, keepdims=True)
    every = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    index = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(every, index, -1), index, every


@both
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(1, 32, 100, 10), (10, 32, 1000, 10), (4, 16, 8193, 4), (3, 8, 5, 5), (8, 64, 1, 1)]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.1, 1.0, 8.0]),
)
def test_it_is_log_softmax_and_a_sort(how, shape, seed, spread):
    rows, hidden, size, k = shape
    rng = np.random.default_rng(seed)
    x, head = rng.normal(size=(rows, hidden)).astype(np.float32), rng.normal(size=(size, hidden)).astype(np.float32)
    x *= spread
    scores, index = top[how](x, head, k)
    expected, order, every = reference(x, head, k)
    assert scores.shape == index.shape == (rows, k)
    assert (scores.dtype, index.dtype) == (jnp.float32, jnp.int32)
    tolerance = 1e-5 * max(1, spread * hidden**0.5)
    np.testing.assert_allclose(scores, expected, atol=tolerance)
    # Neighbours that are closer than rounding may change places; their scores still say so.
    np.testing.assert_allclose(np.take_along_axis(every, np.asarray(index), -1), expected, atol=tolerance)
    clear = (np.diff(expected, axis=-1) < -2 * tolerance).all()
    assert not clear or np.array_equal(index[:, :-1], order[:, :-1])
    assert all(len(set(row)) == k for row in np.asarray(index).tolist())
    assert (np.diff(scores, axis=-1) <= 0).all() and (np.asarray(scores) <= 0).all()


@both
@settings(max_examples=30, deadline=None)
@given(st.sampled_from([100, 1000, 8193]), st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_ties_go_to_the_lower_index(how, size, seed, values):
    """Small integers: the logits are exact, and most of them tie."""
    rng = np.random.default_rng(seed)
    x, head = rng.integers(-1, 2, (6, 4)), rng.integers(-values, values + 1, (size, 4))
    scores, index = top[how](x.astype(np.float32), head.astype(np.float32), 10)
    expected, order, _ = reference(x, head, 10)
    assert np.array_equal(index, order)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@both
@pytest.mark.parametrize("size", [100, 8193])
def test_a_certain_token_has_probability_one_and_never_more(how, size):
    """A child never scores above its parent: the re-rank counts on it."""
    x, head = np.full((1, 8), 50, np.float32), np.random.default_rng(0).normal(size=(size, 8)).astype(np.float32)
    head[size // 2] = 10
    scores, index = top[how](x, head, 3)
    assert int(index[0, 0]) == size // 2 and float(scores[0, 0]) == 0
    assert np.isfinite(scores).all() and (np.asarray(scores[0, 1:]) < -1000).all()


@both
def test_bfloat16_weights_are_summed_in_float32(how):
    rng = np.random.default_rng(0)
    x, head = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((5, 256), (1000, 256)))
    scores, _ = top[how](x, head, 10)
    assert scores.dtype == jnp.float32
    expected, _, _ = reference(x.astype(jnp.float32), head.astype(jnp.float32), 10)
    np.testing.assert_allclose(scores, expected, atol=1e-3)


@pytest.mark.sweep(quick=["*-xla", "100-40-10-True-interpret"])
@both
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("size", "more", "k"), [(100, 40, 10), (200, 64, 4), (65, 130, 10), (64, 5, 3)])
def test_extra_rows_are_rows_like_all_others(how, size, more, k, int8):
    """Under ids of their own; those without one count for nothing, whole tiles of them too."""
    rng = np.random.default_rng(size)
    x, head, weight = (rng.normal(size=(rows, 32)).astype(np.float32) for rows in (5, size, more))
    ids = np.where(rng.random(more) < 0.4, size + np.arange(more), -1).astype(np.int32)
    ids[more // 2 :] = -1
    ids[0], own = size, rng.permutation(size).astype(np.int32)
    weight[0] *= 3  # so that some extra row is among the best
    rounded, scale = jax.jit(quantised)(head) if int8 else (head, None)
    head = np.asarray(rounded) * np.asarray(scale)[:, None] if int8 else head
    scores, found = top[how](x, rounded, k, scale, own, Extra(weight, ids))
    real = np.concatenate([np.ones(size, bool), ids >= 0])
    expected, order, _ = reference(x, np.concatenate([head, weight])[real], k)
    assert np.array_equal(found, np.concatenate([own, ids])[real][order])
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert (np.asarray(found) >= size).any()
    nothing = top[how](x, rounded, k, scale, own, Extra(weight, np.full(more, -1, np.int32)))
    for one, other in zip(nothing, top[how](x, rounded, k, scale, own), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
