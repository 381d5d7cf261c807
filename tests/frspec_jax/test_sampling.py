"""From logits to tokens: transformers' warpers, noise by position alone, and the law of the draws."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from frspec_jax.config import Sampling
from frspec_jax.errors import UserError
from frspec_jax.sampling import Draw, SamplingArrays, choose, gumbel_rows, rule_of, seed_words, typical, warp

WARPS = [
    Sampling(1.0), Sampling(0.3), Sampling(1.7, top_k=1), Sampling(1.0, top_k=5), Sampling(0.8, top_k=50),
    Sampling(1.0, top_p=0.3), Sampling(0.7, top_p=0.9), Sampling(1.3, top_k=20, top_p=0.8), Sampling(1.0, 3, 0.01),
    Sampling(0.05, top_k=400, top_p=0.999), Sampling(0.7, top_k=90, top_p=0.6), Sampling(1.2, min_p=0.1),
    Sampling(0.9, 30, 0.95, min_p=0.02), Sampling(1.0, min_p=0.9),
]  # fmt: skip


def transformers_warp(logits: np.ndarray, how: Sampling) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="torch is not there: pip install -e '.[test]'")
    scores = transformers.TemperatureLogitsWarper(how.temperature)(None, torch.tensor(logits))
    if how.top_k:
        scores = transformers.TopKLogitsWarper(how.top_k)(None, scores)
    if how.top_p < 1:
        scores = transformers.TopPLogitsWarper(how.top_p)(None, scores)
    if how.min_p:
        scores = transformers.MinPLogitsWarper(how.min_p)(None, scores)
    return scores.numpy()


jitted_warp = jax.jit(warp)  # one program for all settings


def warped(logits, how):
    return jitted_warp(logits, SamplingArrays.of(how))


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(WARPS), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 3.0, 12.0]))
def test_warp_is_transformers(how, seed, spread):
    logits = (spread * np.random.default_rng(seed).normal(size=(4, 200))).astype(np.float32)
    mine, theirs = np.asarray(warped(logits, how)), transformers_warp(logits, how)
    # A token on the very edge of top-p may fall either way by rounding.
    before = transformers_warp(logits, dataclasses.replace(how, top_p=1.0, min_p=0.0))
    share = np.cumsum(np.sort(jax.nn.softmax(before)), axis=-1)
    assume(how.top_p == 1 or np.abs(share - (1 - how.top_p)).min() > 1e-6)
    gaps = np.exp(before - before.max(-1, keepdims=True)) - how.min_p  # and one on the edge of min-p
    assume(how.min_p == 0 or np.abs(gaps).min() > 1e-6)
    assert np.array_equal(np.isneginf(mine), np.isneginf(theirs))
    np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_tokens_that_tie_with_the_last_kept_one_stay():
    logits = np.array([[2, 1, 3, 2, 0]], np.float32)
    assert np.isneginf(warped(logits, Sampling(1.0, top_k=2)))[0].tolist() == [False, True, False, False, True]
    assert np.isneginf(transformers_warp(logits, Sampling(1.0, top_k=2)))[0].tolist() == [
        False,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    "how", [Sampling(1.0, top_p=1e-9), Sampling(1.0, 5, 1e-9), Sampling(1.0, top_k=1), Sampling(1e-4)]
)
def test_filters_that_leave_one_token_are_greedy(how):
    logits = jax.random.normal(jax.random.key(0), (50, 100))
    assert np.array_equal(drawn(logits, how), logits.argmax(-1))


def test_flat_logits_keep_all_and_peaked_ones_keep_the_peak():
    flat = np.zeros((1, 1000), np.float32)
    assert np.isfinite(warped(flat, Sampling(1.0, top_p=0.9))).all()  # all of them tie
    peaked = flat.copy()
    peaked[0, 7] = 1e4
    assert np.flatnonzero(np.isfinite(warped(peaked, Sampling(1.0, top_p=0.9)))).tolist() == [7]


# Choosing ----------------------------------------------------------------------------------------


chosen = jax.jit(choose, static_argnames="rule")


def drawn(logits, how=Sampling(1.0), seed=0, sequence=0, positions=None, row=None) -> np.ndarray:
    """`choose`, by default with a position of its own for each node."""
    positions = np.arange(len(logits)) if positions is None else np.asarray(positions)
    row = np.arange(len(logits)) if row is None else np.asarray(row)
    return np.asarray(
        chosen(
            jnp.asarray(logits, jnp.float32),
            rule_of(how),
            Draw.of(how, seed, sequence),
            positions.astype(np.int32),
            row.astype(np.int32),
        )
    )


def test_greedy_is_argmax_whatever_the_seed():
    logits = np.random.default_rng(0).normal(size=(6, 300))
    for seed in (0, 7):
        tokens = drawn(logits, Sampling(), seed)
        assert tokens.dtype == np.int32 and np.array_equal(tokens, logits.argmax(-1))
    assert drawn(np.array([[1, 3, 3, 2]]), Sampling())[0] == 1  # of equal ones the lower id


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=12, max_size=12),
    st.integers(0, 2**31 - 1),
    st.integers(0, 100),
    st.integers(0, 3000),
    st.sampled_from([Sampling(1.0), Sampling(0.7, 20, 0.9)]),
)
def test_a_nodes_token_depends_on_its_logits_and_position_alone(depths, seed, sequence, start, how):
    """The same draw in a tree of twelve nodes, and as vanilla decoding asks for it: alone."""
    logits = np.random.default_rng(seed).normal(size=(12, 40)) * 2
    tree = drawn(logits, how, seed, sequence, start + np.arange(6), depths)
    alone = [drawn(logits[n : n + 1], how, seed, sequence, [start + depths[n]], [0])[0] for n in range(12)]
    assert tree.tolist() == alone


def test_nodes_of_one_depth_share_their_noise():
    logits = np.tile(np.random.default_rng(0).normal(size=40), (12, 1))
    for seed in range(5):
        tokens = drawn(logits, seed=seed, positions=[5, 6, 7], row=np.repeat([0, 1, 2], 4))
        assert all(len(set(part)) == 1 for part in tokens.reshape(3, 4))


def test_noise_differs_by_seed_sequence_and_position():
    def row(seed=3, sequence=4, position=5):
        return tuple(np.asarray(gumbel_rows(seed_words(seed), jnp.int32(sequence), jnp.array([position]), 64)[0]))

    rows = [
        row(),
        row(seed=4),
        row(sequence=5),
        row(position=6),
        row(4, 3, 5),
        row(3, 5, 4),
        row(5, 4, 3),
        row(0, 0, 0),
    ]
    assert len(set(rows)) == len(rows) and row() == rows[0]
    far = gumbel_rows(seed_words(-1), jnp.int32(2**31 - 1), jnp.array([2**31 - 2, 2**31 - 1]), 64)
    assert np.isfinite(far).all() and not np.array_equal(far[0], far[1])


LAW = np.array([0.45, 0.3, 0.15, 0.08, 0.02])


@pytest.mark.parametrize(
    ("how", "law"),
    [
        (Sampling(1.0), LAW),
        (Sampling(2.0), LAW**0.5),
        (Sampling(1.0, top_k=3), LAW * [1, 1, 1, 0, 0]),
        (Sampling(1.0, top_p=0.7), LAW * [1, 1, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("over", ["positions", "seeds", "sequences"])
def test_draws_follow_the_law(how, law, over):
    """Independent over positions, over seeds, and over the members of a batch: chi-square, and on pairs too."""
    count, logits = 20_000, jnp.log(jnp.asarray(LAW, jnp.float32))

    def draw(n):
        fixed = {"positions": jnp.int32(3), "seeds": jnp.int32(1), "sequences": jnp.int32(2)} | {over: n}
        seed = jnp.stack([jnp.uint32(0), fixed["seeds"].astype(jnp.uint32)])
        mine = Draw(SamplingArrays.of(how), seed, fixed["sequences"])
        return choose(logits[None], rule_of(how), mine, fixed["positions"][None], jnp.array([0]))[0]

    tokens = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(count)))
    law = law / law.sum()
    seen, alive = np.bincount(tokens, minlength=5), law > 0
    assert not seen[~alive].any()
    assert stats.chisquare(seen[alive], count * law[alive]).pvalue > 1e-3
    pairs = np.bincount(5 * tokens[:-1:2] + tokens[1::2], minlength=25).astype(float)
    both = np.outer(law, law).ravel()
    assert stats.chisquare(pairs[both > 0], count / 2 * both[both > 0]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"min_p": -0.1}, "min_p -0.1"),
        ({"min_p": 1.0}, "min_p 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(bad, said):
    with pytest.raises(UserError, match=said):
        Sampling(**bad)


@pytest.mark.parametrize("settings", [Sampling(0.7, typical=0.09), Sampling(1.0, 5, 0.9, typical=0.3)])
def test_typical_acceptance_is_medusas_rule(settings):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(9, 40)).astype(np.float32) * 4
    tokens, parent = rng.integers(0, 40, 9), np.array([0, 0, 0, 1, 1, 2, 3, 3, 5])
    tokens[1:4] = logits.argmax(-1)[parent[1:4]]  # some that are likely
    share = np.asarray(jax.nn.softmax(warped(logits, settings), axis=-1), np.float64)
    expected = []
    for token, above in zip(tokens, parent, strict=True):
        entropy = -sum(p * np.log(p) for p in share[above] if p > 0)
        expected.append(share[above, token] > min(settings.typical, np.sqrt(settings.typical) * np.exp(-entropy)))
    found = typical(jnp.asarray(logits), SamplingArrays.of(settings), jnp.asarray(tokens), jnp.asarray(parent))
    assert np.asarray(found).tolist() == expected and 0 < sum(expected) < 9


@pytest.mark.parametrize(
    ("settings", "sentence"), [((0.7, 0, 1.0, 1.5), "must be 0"), ((0.0, 0, 1.0, 0.1), "needs temperature")]
)
def test_typical_acceptance_is_refused_where_it_makes_no_sense(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Sampling(*settings)


@settings(max_examples=200, deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_every_seed_of_64_bits_is_another(one, other):
    assert (seed_words(one).tolist() == seed_words(other).tolist()) == (one == other)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, -1, -(2**31)])
def test_seeds_of_32_bits_are_jaxs_own(seed):
    """So a text that was sampled with one before seeds had 64 bits is sampled again."""
    assert seed_words(seed).tolist() == jax.random.key_data(jax.jit(jax.random.key)(np.int32(seed))).tolist()


def test_a_request_that_is_greedy_among_sampled_ones_takes_the_best_token():
    """A batch has one rule: temperature 0 then stands for no noise."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 300)), jnp.float32)
    where = jnp.arange(6, dtype=jnp.int32)
    tokens = chosen(logits, "sampled", Draw.of(Sampling(), 3), where, where)
    assert np.array_equal(tokens, logits.argmax(-1))
