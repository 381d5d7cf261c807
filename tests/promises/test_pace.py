"""Promises 1 and 2 with a pace: whatever its tables say, the tokens are vanilla's; one program serves all tables."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frspec_jax import engine, prefill
from frspec_jax.config import Sampling
from frspec_jax.pace import GRID, Costs, Odds, PaceTables
from frspec_jax.pace_tables import forced
from frspec_jax.plan import Plan
from frspec_jax.prefill import Chunks
from frspec_jax.state import OWN, Asked, new_caches
from tests.promises.test_compiled_once import programs
from tests.support import toy

CFG = toy.config(vocab_size=12)
PROMPT = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], np.int32)
KINDS = [None, *toy.DRAFTS]


def tables(plan: Plan, seed: int) -> PaceTables:
    """Costs and odds out of nowhere: some are zero, some absurd, none need rise or fall."""
    rng = np.random.default_rng(seed)
    sizes, levels, tokens = len(plan.pace.sizes), plan.pace.growth.depth, plan.tree.depth

    def costs(count):
        return (10.0 ** rng.uniform(-3, 3, count) * (rng.uniform(size=count) > 0.1)).tolist()

    return PaceTables(
        Costs.of(costs(sizes), costs(levels + 1)),
        Odds.of(rng.uniform(0, 1, (levels, len(GRID))).tolist(), rng.uniform(0, 1, (7, tokens)).tolist()),
    )


@pytest.mark.sweep(quick=["eagle-*", "None-greedy"])
@pytest.mark.as_shipped
@pytest.mark.parametrize("drawn", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_table_changes_the_text(kind, drawn):
    plan, w = toy.paced(CFG, kind, drawn, toy.CROPPED)
    vanilla = toy.vanilla_plan(CFG, drawn)
    seen = set()

    @settings(max_examples=12, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def check(seed):
        prompt = np.random.default_rng(seed).integers(0, 12, 5 + seed % 9)
        expected, _ = toy.decode(vanilla, w, prompt, 24, drawn, seed=seed % 5)
        mine = dataclasses.replace(w, pace=tables(plan, seed))
        tokens, state = toy.decode(plan, mine, prompt, 24, drawn, seed=seed % 5)
        assert tokens == expected
        assert int((np.asarray(state.histogram) * np.arange(1, plan.tree.depth + 2)).sum()) == len(tokens) - 1
        origins = np.asarray(state.origins)[1 : len(tokens)]
        assert (origins == OWN).sum() <= int(state.rounds)
        seen.add((int(state.rounds), tuple(np.bincount(origins, minlength=3))))

    check()
    assert len(seen) > 3, "all tables came to the same rounds, so this test would prove little"


@pytest.mark.sweep(quick=["eagle", "None"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_program_for_all_tables(kind):
    plan, w = toy.paced(CFG, kind)
    toy.decode(plan, w, PROMPT, 8)
    with programs() as made:
        for seed in range(5):
            toy.decode(plan, dataclasses.replace(w, pace=tables(plan, seed)), PROMPT, 12 + seed)
    assert made == []


def test_every_size_and_level_is_right_by_itself():
    """Forced to one choice for a whole text. Rounds that draft nothing put off what the drafter takes in."""
    vanilla = toy.vanilla_plan(CFG)
    plan, w = toy.paced(CFG, "eagle")
    expected, _ = toy.decode(vanilla, w, PROMPT, 60)
    rounds = {}
    for size in range(len(plan.pace.sizes)):
        for levels in range(plan.pace.growth.depth + 1):
            mine = dataclasses.replace(w, pace=dataclasses.replace(w.pace, costs=forced(plan.pace, size, levels)))
            tokens, state = toy.decode(plan, mine, PROMPT, 60)
            assert tokens == expected
            rounds[size, levels] = int(state.rounds)
    assert rounds[0, 0] == 59 and rounds[size, levels] < rounds[0, 0]


def test_what_waits_is_what_the_drafter_would_have_taken_in():
    """A text decoded without drafting, then with it: the draft's memory is as if it had drafted all the time."""
    plan, w = toy.paced(CFG, "eagle", lookup=False)

    def with_levels(levels):
        return dataclasses.replace(w, pace=dataclasses.replace(w.pace, costs=forced(plan.pace, 2, levels)))

    states = []
    for first in (0, 3):
        caches = new_caches(plan, 256, np.float32)
        asked = Asked.of(Sampling(), seed=0, limit=40)
        state = prefill.start(plan, w, caches, PROMPT, asked, chunks=Chunks(32))
        while int(state.length) < 24:
            state = engine.run(plan, with_levels(first), state, np.int32(1))
        state = engine.run(plan, with_levels(3), state, np.int32(3))
        states.append(state)
    length = min(int(state.length) for state in states) - plan.tree.depth - 2
    one, other = (np.asarray(state.caches.draft.kv.keys)[:, :length] for state in states)
    np.testing.assert_allclose(one, other, atol=2e-5)
    assert np.abs(one).sum() > 0
