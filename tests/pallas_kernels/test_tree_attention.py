"""Attention over a KV cache and a tree, against the textbook formula in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.device import H100, compiling_for
from pallas_kernels.tree_attention import BLOCK, How, attention_rows, seam, tree_attention, xla
from pallas_kernels.tree_attention.xla import DENSE_LIMIT
from pallas_kernels.visibility import Sees, bit_words, has_bit
from tests import conftest

pytestmark = pytest.mark.as_shipped
WAYS = ("xla", "interpret", "pallas") if jax.default_backend() == "gpu" else ("xla", "interpret")
attend = {how: jax.jit(functools.partial(tree_attention, implementation=how)) for how in WAYS}
attend["straight"] = jax.jit(xla.straight)  # XLA's on a GPU
both = pytest.mark.parametrize("how", list(attend))
WAY = {how: {} if how == "straight" else {"implementation": how} for how in attend}

# (tokens, KV heads, queries per KV head, head_dim, capacity); the last two walk the cache in blocks.
SHAPES = [(8, 2, 3, 64, 256), (70, 2, 1, 80, 256), (5, 1, 3, 8, 512), (70, 2, 3, 64, 1024), (33, 3, 1, 8, 1024)]
GARBAGE = 3e30  # finite, as everything is that stands in a cache; larger than any real entry


# One program for each shape, not one for each of their operations.
words_of, dense_of = jax.jit(bit_words), jax.jit(Sees.dense, static_argnums=1)


def sees(committed, line, first=None) -> Sees:
    """Who sees whom.

    line: [T, T] booleans, which rows of the tree behind the committed ones each query sees. first: [T], of the
    committed rows it sees those from this one on (a window); None: all.
    """
    return Sees(
        jnp.int32(committed), words_of(jnp.asarray(line)), None if first is None else jnp.asarray(first, jnp.int32)
    )


def reference(q, keys, values, committed, line, first=None, cap=0.0) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention query by query, over the rows that each one sees, in float64; cap: of its scores, 0: none.

    Returns what it gives [T, heads, head_dim], and what it would give if all values were positive.
    """
    dense = np.asarray(dense_of(sees(committed, line, first), keys.shape[1]))
    q, keys, values = (np.asarray(x, np.float64) for x in (q, keys, values))
    tokens, heads, head_dim = q.shape
    group = heads // keys.shape[0]
    out, size = np.zeros_like(q), np.zeros_like(q)
    for t in range(tokens):
        rows = np.flatnonzero(dense[t])
        for head in range(heads):
            scores = keys[head // group, rows] @ q[t, head] / np.sqrt(head_dim)
            scores = cap * np.tanh(scores / cap) if cap else scores
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[t, head] = weights @ values[head // group, rows]
            size[t, head] = weights @ np.abs(values[head // group, rows])
    return out, size


def case(shape, committed, kind, seed, spread=1.0):
    """Queries, and a cache whose invisible rows hold what must not be seen."""
    tokens, kv_heads, group, head_dim, capacity = shape
    rng = np.random.default_rng(seed)
    q = (spread * rng.normal(size=(tokens, kv_heads * group, head_dim))).astype(np.float32)
    keys, values = rng.normal(size=(2, kv_heads, capacity, head_dim)).astype(np.float32)
    keys[:, committed + tokens :] = values[:, committed + tokens :] = GARBAGE
    line = np.eye(tokens, dtype=bool)
    if kind == "chain":
        line |= np.tri(tokens, dtype=bool)
    elif kind == "tree":
        for t in range(1, tokens):
            line[t] |= line[rng.integers(0, t)]
    elif kind == "any":  # tree_attention asks for no tree: only that a query sees itself
        line |= rng.random((tokens, tokens)) < rng.random()
    return q, keys, values, committed, line


def ours(how, q, keys, values, committed, line) -> np.ndarray:
    return np.asarray(attend[how](q, keys, values, sees(committed, line)))


def capped(how, cap):
    """`attend[how]` with a soft cap."""
    attends = (
        functools.partial(xla.straight, cap=cap)
        if how == "straight"
        else functools.partial(tree_attention, how=How(cap))
    )
    return jax.jit(functools.partial(attends, **WAY[how]))


def error(mine, exact) -> float:
    """The largest difference, by the mean size of the values that were mixed (signs apart: they cancel in the mix)."""
    mixed, size = exact
    return float((np.abs(np.asarray(mine, np.float64) - mixed) / size).max())


@both
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.floats(0, 1),
    st.sampled_from(["alone", "chain", "tree", "any"]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([(0.1, 2e-6), (1.0, 2e-6), (4.0, 2e-5)]),
)
def test_it_is_softmax_attention(how, shape, fill, kind, seed, spread):
    """Wide spreads give scores beyond 20, whose own rounding in float32 is some 1e-6: weights carry it on."""
    committed = round(fill * (shape[4] - shape[0]))  # from an empty cache to a full one
    given = case(shape, committed, kind, seed, spread[0])
    assert error(ours(how, *given), reference(*given)) < spread[1]


@both
@pytest.mark.parametrize("shape", SHAPES[::3])
def test_at_every_edge_of_a_block(how, shape):
    for edge in range(0, shape[4], BLOCK):
        for committed in (edge - shape[0], edge - 1, edge, edge + 1):
            if 0 <= committed <= shape[4] - shape[0]:
                given = case(shape, committed, "tree", committed)
                assert error(ours(how, *given), reference(*given)) < 2e-6


@pytest.mark.sweep(quick=["*-xla", "*-straight", "shape4-interpret"])
@both
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_a_query_does_not_see_change_nothing(how, shape):
    """Bit for bit: rows behind the tree, and siblings within it."""
    tokens, _, _, _, capacity = shape
    q, keys, values, committed, line = case(shape, min(300, capacity - tokens - 20), "alone", seed=1)
    before = ours(how, q, keys, values, committed, line)
    hidden = committed + np.arange(1, capacity - committed)  # all but the first tree row
    rng = np.random.default_rng(2)
    keys[:, hidden], values[:, hidden] = rng.normal(size=(2, *keys[:, hidden].shape))
    assert np.array_equal(ours(how, q, keys, values, committed, line)[0], before[0])
    keys[:, committed] += 1
    assert not np.array_equal(ours(how, q, keys, values, committed, line)[0], before[0])


@pytest.mark.sweep(quick=["*-xla", "*-straight", "3.0-shape0-interpret"])
@both
@pytest.mark.parametrize("shape", SHAPES[:2] + SHAPES[3:])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_a_window_and_a_cap(how, shape, cap):
    """Of the committed rows each query sees those from a first one on; scores are kept within a cap before the mask."""
    tokens, _, _, _, capacity = shape
    attend_so = capped(how, cap)
    for seed, fill in enumerate((0.0, 0.4, 1.0)):
        committed = round(fill * (capacity - tokens))
        q, keys, values, _, line = case(shape, committed, "any", seed, spread=3.0)
        rng = np.random.default_rng(seed)
        first = rng.integers(0, committed + 2, tokens) if seed else np.zeros(tokens, int)
        first = np.sort(first) if seed == 1 else first
        keys[:, : max(first.min() - 1, 0)] = GARBAGE  # before what any query sees
        seen = sees(committed, line, first)
        dense, rows = np.asarray(dense_of(seen, capacity)), np.arange(capacity)
        assert np.array_equal(dense[:, :committed], (rows >= first[:, None])[:, :committed])
        assert error(attend_so(q, keys, values, seen), reference(q, keys, values, committed, line, first, cap)) < 2e-5


def test_both_paths_agree():
    """The same rows in a cache below the limit of the dense path and in one above it."""
    assert SHAPES[2][4] <= DENSE_LIMIT < SHAPES[3][4]
    q, keys, values, committed, line = case((8, 2, 3, 64, 512), 400, "tree", seed=3)
    longer = [np.concatenate([x, np.full_like(x, GARBAGE)], axis=1) for x in (keys, values)]
    exact = reference(q, keys, values, committed, line)
    dense, blocks = ours("xla", q, keys, values, committed, line), ours("xla", q, *longer, committed, line)
    assert error(dense, exact) < 2e-6 and error(blocks, exact) < 2e-6
    assert error(blocks, (dense.astype(np.float64), exact[1])) < 2e-6


@both
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]])
def test_bfloat16_is_float32_but_for_rounding(how, shape):
    q, keys, values, committed, line = case(shape, shape[4] - shape[0] - 3, "tree", seed=4)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, keys, values)]
    mine = ours(how, *rounded, committed, line)
    assert mine.dtype == jnp.bfloat16
    exact = reference(*(np.asarray(x, np.float32) for x in rounded), committed, line)
    # Scores are float32; the weights are rounded once, by 2^-9, before they meet the values, and the output once more.
    assert error(mine, exact) < 2.0**-8


# XLA on a GPU ------------------------------------------------------------------------------------


def test_only_xla_on_a_gpu_is_limited_to_some_rows():
    assert attention_rows(4096, "xla") == attention_rows(4096, "auto") == (4096,)
    with compiling_for(H100):
        assert attention_rows(4096, "auto") == attention_rows(4096, "pallas") == (4096,)
        assert attention_rows(4096, "xla") == (512, 2048, 4096) and attention_rows(768, "xla") == (768,)


def test_rows_that_are_not_read_may_hold_anything():
    given = case((8, 2, 3, 64, 768), 300, "tree", seed=5)
    q, keys, values, committed, line = given
    keys[:, 512:] = values[:, 512:] = np.nan
    with compiling_for(H100):
        limited = jax.jit(functools.partial(tree_attention, implementation="xla", how=How(rows=512)))
        mine = limited(q, keys, values, sees(committed, line))
    assert error(mine, reference(*given)) < 2e-6


# Who sees whom -------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_the_dense_form_is_committed_rows_and_then_the_line(committed, tokens, seed):
    line = np.random.default_rng(seed).random((tokens, tokens)) < 0.5
    dense = np.zeros((tokens, 300), bool)
    dense[:, :committed] = True
    dense[:, committed : committed + tokens] = line
    assert np.array_equal(sees(committed, line).dense(300), dense)


# Words of bits -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 31, 32, 33, 64, 70]), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.0]))
def test_bits_return_from_words(rows, seed, share):
    visible = np.random.default_rng(seed).random((3, rows)) < share
    words = bit_words(jnp.asarray(visible))
    assert words.dtype == jnp.int32 and words.shape == (3, -(-rows // 32))
    found = np.asarray(has_bit(words, jnp.arange(-70, 200)))
    assert np.array_equal(found[:, 70 : 70 + rows], visible)
    assert not found[:, :70].any() and not found[:, 70 + rows :].any()  # rows outside are unset
    expected = [sum(1 << r for r in np.flatnonzero(row).tolist()) for row in visible]
    assert [sum((int(w) & 0xFFFFFFFF) << 32 * n for n, w in enumerate(row)) for row in words] == expected


def test_words_keep_leading_axes():
    visible = np.random.default_rng(0).random((2, 3, 40)) < 0.5
    words = bit_words(jnp.asarray(visible))
    assert words.shape == (2, 3, 2) and np.array_equal(words[1], bit_words(jnp.asarray(visible[1])))
    assert has_bit(words[0], jnp.arange(6).reshape(2, 3)).shape == (3, 2, 3)


@pytest.mark.sweep(quick=["256-*", "1024-shape0"])
@pytest.mark.skipif(not conftest.HAS_AMX, reason="other CPUs round otherwise in bfloat16")
@pytest.mark.parametrize("shape", [(3, 3, 64), (2, 7, 64), (8, 4, 128), (1, 1, 8), (1, 4, 256), (1, 8, 256)])
@pytest.mark.parametrize("capacity", [BLOCK, 4 * BLOCK])
def test_a_row_has_the_same_bits_alone_and_in_a_tree(shape, capacity):
    """On a CPU in bfloat16: `steady_mix`. The path's keys stand with gaps in the tree, and without alone.

    Where `seam` says that sums begin anew, every key has to be in its block already (`tree.within_blocks`).
    """
    between = seam(capacity, jnp.dtype(jnp.uint16), steady=True)
    assert between == (BLOCK if capacity > BLOCK else None)
    kv_heads, group, head_dim = shape
    rng = np.random.default_rng(0)

    def bits(rows):
        return jax.lax.bitcast_convert_type(jnp.asarray(rows, jnp.bfloat16), jnp.uint16)

    for tokens in 8 * (4, 8, 16, 60):
        last = 150 if between is None else BLOCK + 20  # trees across the first seam, and behind it
        committed, depth = int(rng.integers(1 if tokens == 60 else last - 40, last)), int(rng.integers(1, 4))
        path = np.sort(rng.choice(tokens, depth, replace=False))
        if between and ((committed + path) // between != (committed + np.arange(depth)) // between).any():
            continue
        q = jnp.asarray(rng.normal(size=(tokens, kv_heads * group, head_dim)), jnp.bfloat16)
        cache = rng.normal(size=(2, kv_heads, capacity, head_dim))
        line = np.eye(tokens, dtype=bool) | (rng.random((tokens, tokens)) < 0.5)
        line[path[-1]] = False
        line[path[-1], path] = True
        in_tree = ours("xla", q, *bits(cache), committed, line)[path[-1]]
        alone = rng.normal(size=cache.shape)
        alone[:, :, :committed] = cache[:, :, :committed]
        alone[:, :, committed : committed + depth] = cache[:, :, committed + path]
        # The tokens above it are committed by then.
        by_itself = ours("xla", q[path[-1]][None], *bits(alone), committed + depth - 1, np.ones((1, 1), bool))[0]
        np.testing.assert_array_equal(in_tree, by_itself)
