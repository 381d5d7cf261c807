"""The decisions of a pace: what is merged, ordered, chosen and learnt; and what they may never do."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frspec_jax import pace
from frspec_jax.config import TreeConfig
from frspec_jax.lookup import Chain
from frspec_jax.pace import Costs, Facts, Growing, Odds, Pace, PaceTables, Pulse, Trust
from frspec_jax.pace_tables import DEFAULT, forced
from frspec_jax.tree import Candidates, best_first, rerank

K, LEVELS, T = 3, 3, 5
BY_LEVEL = (K, K * K, K * K)
TREE = TreeConfig(8, 5, K)
SIZES = Pace((1, 2, 4, 8), TreeConfig(8, 3, 4))


@st.composite
def drafted(draw):
    """Candidates as beams propose them, siblings all different."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens, scores, parent = [], [], []
    beams, above = [(-1, 0.0)], 0
    for level in range(LEVELS):
        first = len(tokens)
        for number, score in beams:
            tokens += rng.permutation(5)[:K].tolist()
            scores += np.sort(score + np.log(rng.uniform(0.01, 1, K)))[::-1].tolist()
            parent += [number] * K
        here = np.arange(first, len(tokens))
        best = here[np.argsort(-np.asarray(scores)[here], kind="stable")][:K]
        beams = [(int(n), scores[n]) for n in best]
        above = level
    assert above == LEVELS - 1
    return Candidates(jnp.asarray(tokens, jnp.int32), jnp.asarray(scores, jnp.float32), jnp.asarray(parent, jnp.int32))


def paths(candidates: Candidates) -> list[tuple[int, ...]]:
    """The tokens down to each candidate that is there, and () for others."""
    found: list[tuple[int, ...]] = []
    for token, score, parent in zip(*map(np.asarray, dataclasses.astuple(candidates)), strict=True):
        if score == -np.inf:
            found.append(())
        else:
            assert parent < 0 or found[parent], "a node stands below one that is not there"
            found.append((*(found[parent] if parent >= 0 else ()), int(token)))
    return found


joined = jax.jit(pace.joined, static_argnames="levels")


@settings(max_examples=60, deadline=None)
@given(drafted(), st.lists(st.integers(0, 4), min_size=T, max_size=T), st.integers(0, 99))
def test_a_chain_and_beams_are_one_tree(candidates, tokens, seed):
    """Every path of either once, at the better of both chances, no child likelier than its parent, parents first."""
    chances = np.log(np.random.default_rng(seed).uniform(0.05, 1, T)).cumsum().astype(np.float32)
    whole = joined(candidates, BY_LEVEL, jnp.asarray(tokens, jnp.int32), jnp.asarray(chances))
    before, after = paths(candidates), paths(whole)
    there = [path for path in after if path]
    assert len(there) == len(set(there))
    chain = [tuple(tokens[: i + 1]) for i in range(T)]
    assert set(there) == set(before) | set(chain)
    best = dict(zip(before, np.asarray(candidates.scores), strict=True))
    for path, score in zip(after, np.asarray(whole.scores), strict=True):
        if path:
            wanted = max(best.get(path, -np.inf), chances[len(path) - 1] if path in chain else -np.inf)
            assert score == pytest.approx(wanted, rel=1e-6)
    parent, scores = np.asarray(whole.parent), np.asarray(whole.scores)
    for number in range(whole.count):
        assert parent[number] < number
        assert parent[number] < 0 or scores[number] <= scores[parent[number]]


ordered_of, reranked = (jax.jit(function, static_argnums=0) for function in (best_first, rerank))


@settings(max_examples=40, deadline=None)
@given(drafted())
def test_best_first_holds_the_same_nodes_and_every_beginning_of_it_is_a_tree(candidates):
    ordered, kept = ordered_of(TREE, candidates, jnp.int32(7))
    proposed = reranked(TREE, candidates, jnp.int32(7))

    def nodes(tree):
        return sorted(zip(np.asarray(tree.depth).tolist(), np.asarray(tree.tokens).tolist(), strict=True))

    assert nodes(ordered) == nodes(proposed)
    scores = np.asarray(candidates.scores)[np.asarray(kept)]
    assert (np.diff(scores) <= 0).all()
    for size in (1, 2, 4, 8):
        part = ordered.first(size)
        assert (np.asarray(part.parent) <= np.arange(size)).all()
        if size > 1:
            assert nodes(part) == nodes(reranked(dataclasses.replace(TREE, size=size), candidates, jnp.int32(7)))


def test_the_size_that_pays_is_chosen():
    """By hand: 1, 1.9, 2.6 and 2.8 tokens expected; a millisecond is worth a twentieth of a token."""
    sizes, costs = SIZES, Costs.of([20, 25, 30, 36], [0, 2, 3, 4])
    likely = jnp.log(jnp.array([0.9, 0.4, 0.3, 0.1, 0.05, 0.03, 0.02]))
    choice = pace.best_size(sizes, costs, jnp.float32(0.05), likely)
    assert int(choice.index) == 2 and float(choice.tokens) == pytest.approx(2.6)
    assert float(choice.worth) == pytest.approx(2.6 - 1.5)
    assert int(pace.best_size(sizes, costs, jnp.float32(1.0), likely).index) == 0
    assert int(pace.best_size(sizes, costs, jnp.float32(0.0), likely).index) == 3
    assert int(pace.best_size(sizes, costs, jnp.float32(0.05), jnp.zeros(0)).index) == 0


def test_drafting_rests_where_it_does_not_pay_and_is_tried_again():
    costs = Costs.of([20, 25], [0, 2, 3])
    pulse = dataclasses.replace(Pulse.still(), gain=jnp.float32(0.01))
    price = pulse.price(costs)
    assert float(price) == pytest.approx(1 / 20)
    assert not pace.drafting_pays(costs, price, pulse, jnp.float32(1))
    idle = Facts(jnp.int32(0), jnp.int32(0), jnp.float32(9), jnp.int32(1))
    for _ in range(pace.PROBE):
        pulse = pace.after(pulse, costs, idle)
    assert float(pulse.gain) == pytest.approx(0.01)  # of rounds in which nothing was drafted nothing is learnt
    assert pace.drafting_pays(costs, price, pulse, jnp.float32(1))
    pulse = pace.after(pulse, costs, dataclasses.replace(idle, levels=jnp.int32(2), gain=jnp.float32(3)))
    assert int(pulse.idle) == 0 and pace.drafting_pays(costs, price, pulse, jnp.float32(1))
    assert not pace.drafting_pays(costs, price, pulse, jnp.float32(0.01))  # the text knows already


def test_what_a_millisecond_is_worth_follows_the_text():
    costs, pulse = Costs.of([20, 25], [0, 2, 3]), Pulse.still()
    brought = Facts(jnp.int32(1), jnp.int32(1), jnp.float32(1), jnp.int32(3))
    for _ in range(60):
        pulse = pace.after(pulse, costs, brought)
    assert float(pulse.price(costs)) == pytest.approx(3 / 27, rel=0.15)
    for _ in range(60):
        pulse = pace.after(pulse, costs, dataclasses.replace(brought, emitted=jnp.int32(1)))
    assert float(pulse.price(costs)) == pytest.approx(1 / 20)  # never less than vanilla makes of it


def test_promises_that_are_not_kept_are_believed_less():
    promised, came, trust = jnp.array([1.0, 0.5]), jnp.array([0, 1], jnp.int32), Trust.unproven()
    for _ in range(80):
        trust = trust.after(promised, came)
    drafted, copied = np.asarray(trust.scale)
    assert drafted == pytest.approx(4 / 14, abs=0.03) and copied == pytest.approx(1.5, abs=0.1)
    odds = DEFAULT.odds(2, 3)
    chain = Chain(jnp.zeros(3, jnp.int32), jnp.int32(4))
    plain, doubted = (np.exp(pace.copied(odds, chain, jnp.float32(trust))) for trust in (1.0, 0.5))
    np.testing.assert_allclose(doubted, plain / 2, rtol=1e-5)


@given(st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4), st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_calibrated_chances_keep_their_order(chances, level):
    rng = np.random.default_rng(level)
    odds = Odds.of([np.sort(rng.uniform(0, 1, len(pace.GRID))).tolist() for _ in range(3)], [[0.0]])
    growing = Growing(SIZES, PaceTables(Costs.of([1.0], [0, 1, 2, 3]), odds), jnp.float32(1), jnp.float32(0.7))
    likely = np.asarray(growing.likely(jnp.log(jnp.array(sorted(chances))), level))
    assert (np.diff(likely) >= 0).all() and (likely <= 0).all() and np.isfinite(likely).all()


@pytest.mark.parametrize("size", range(4))
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_forced_costs_leave_one_choice(size, levels):
    """What measuring rests on: whatever the odds say, these rounds verify and draft as much as is asked."""
    sizes = SIZES
    costs, pulse = forced(sizes, size, levels), dataclasses.replace(Pulse.still(), gain=jnp.float32(1))
    price = pulse.price(costs)
    for likely in (jnp.zeros(7), jnp.full(7, -20.0)):
        assert int(pace.best_size(sizes, costs, price, likely).index) == size
    assert bool(pace.drafting_pays(costs, price, pulse, jnp.float32(0.05))) == (levels > 0)
    growing = Growing(sizes, PaceTables(costs, DEFAULT.odds(3, 5)), price, jnp.float32(1))
    for level in (1, 2):
        went = growing.on(level, jnp.log(jnp.array([0.01, 0.005])), lambda c: c + 1, jnp.int32(0))
        assert int(went) == (level < levels)


def test_odds_are_read_as_interpolation_does():
    rng = np.random.default_rng(5)
    said, table = rng.uniform(0, 1, (4, 7)).astype(np.float32), rng.uniform(0, 1, len(pace.GRID)).astype(np.float32)
    expected = np.interp(said, pace.GRID, table)
    np.testing.assert_allclose(pace.interpolated(jnp.asarray(said), jnp.asarray(table)), expected, atol=1e-6)
    np.testing.assert_allclose(pace.interpolated(jnp.asarray(pace.GRID), jnp.asarray(table)), table, atol=1e-6)
