"""The promises with slots for ids of the text so far: same text, no copy of a cache, one program for all texts."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax import engine, prefill
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.pace_tables import forced
from frspec_jax.prefill import Chunks
from frspec_jax.state import DRAFTED, OWN, Asked, new_caches
from tests.promises.test_compiled_once import programs
from tests.support import toy

CFG, TREE, KEPT, SLOTS = toy.config(vocab_size=12), TreeConfig(8, 3, 4), np.array([5, 1, 9, 3]), 3
KINDS = ["eagle", "copying", "eagle3"]


@pytest.mark.sweep(quick=["eagle-*"])
@pytest.mark.parametrize("settings", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_slots_change_nothing_but_what_is_drafted(kind, settings):
    """The tokens are vanilla's, more prompts compile nothing, and tokens outside V' were drafted and accepted."""
    w, drafter = toy.weights(CFG, KEPT, kind=kind, slots=SLOTS)
    vanilla, plan = toy.vanilla_plan(CFG, settings), toy.plan(CFG, drafter, TREE, settings)
    outside = 0
    toy.decode(vanilla, w, [1, 2, 3], 4, settings), toy.decode(plan, w, [1, 2, 3], 4, settings)
    with programs() as made:
        for seed in range(6):
            prompt = np.random.default_rng(seed).integers(0, 12, 20 + 9 * seed)
            expected, _ = toy.decode(vanilla, w, prompt, 40, settings, seed=seed)
            tokens, state = toy.decode(plan, w, prompt, 40, settings, seed=seed)
            assert tokens == expected
            drafted = np.asarray(state.origins)[: len(tokens)] != OWN
            outside += int((drafted & ~np.isin(tokens, KEPT)).sum())
    assert made == []
    assert outside > 0, "nothing outside V' was ever accepted: this test would prove nothing"


@pytest.mark.sweep(quick=["eagle"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_pace(kind):
    """Rounds that draft nothing put off what the slots see as well."""
    plan, w = toy.paced(CFG, kind, ids=KEPT, slots=SLOTS, lookup=kind == "eagle")
    vanilla, outside = toy.vanilla_plan(CFG), 0
    for size, levels in ((0, 0), (2, 1), (2, 3)):
        mine = dataclasses.replace(w, pace=dataclasses.replace(w.pace, costs=forced(plan.pace, size, levels)))
        for seed in range(4):
            prompt = np.random.default_rng(seed).integers(0, 12, 30)
            expected, _ = toy.decode(vanilla, w, prompt, 40)
            tokens, state = toy.decode(plan, mine, prompt, 40)
            assert tokens == expected
            drafted = np.asarray(state.origins)[: len(tokens)] == DRAFTED
            outside += int((drafted & ~np.isin(tokens, KEPT)).sum())
    assert outside > 0


@pytest.mark.sweep(quick=["fixed"])
@pytest.mark.as_shipped
@pytest.mark.parametrize("pace", ["fixed", "auto"])
def test_no_copy_of_a_cache(pace):
    w, drafter = toy.weights(CFG, KEPT, slots=SLOTS)
    plan = toy.plan(CFG, drafter, TREE)
    if pace == "auto":
        plan, w = toy.paced(CFG, "eagle", ids=KEPT, slots=SLOTS)
    asked = Asked.of(Sampling(), seed=0, limit=8)
    caches = new_caches(plan, 512, jnp.float32)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    state = prefill.start(plan, w, caches, np.arange(9, dtype=np.int32), asked, chunks=Chunks(32))
    shape = rf"f32\[{','.join(map(str, state.caches.target[0].keys.shape))}\]"
    program = engine.run.lower(plan, w, state, np.int32(5)).compile()
    text = program.as_text()
    assert re.search(shape, text)
    assert [line for line in text.splitlines() if re.search(rf"= {shape}\S* copy(-start)?\(", line)] == []
    assert program.memory_analysis().alias_size_in_bytes >= size


def test_a_text_knows_nothing_of_the_one_before():
    """Caches serve the next text uncleared: its slots hold what they would in new ones."""
    w, drafter = toy.weights(CFG, KEPT, slots=SLOTS)
    plan, asked = toy.plan(CFG, drafter, TREE), Asked.of(Sampling(), seed=0, limit=20)
    caches, seen = new_caches(plan, 256, jnp.float32), []
    other = prefill.start(plan, w, caches, np.array([0, 2, 4, 6, 8], np.int32), asked, chunks=Chunks(32))
    for where in (other.caches, new_caches(plan, 256, jnp.float32)):
        state = prefill.start(plan, w, where, np.array([7, 5, 10, 1, 7], np.int32), asked, chunks=Chunks(32))
        seen.append(jax.tree.map(np.asarray, state.caches.draft.slots))
    assert seen[0].ids.tolist() == seen[1].ids.tolist() == [7, 10, -1]
    assert seen[0].last.tolist() == seen[1].last.tolist() == [4, 2, -1]


def test_slots_after_a_text_are_its_last_ids_outside_the_sub_vocabulary():
    """Prompt in several chunks and many rounds; but for the last root, which is taken in by the next round."""
    w, drafter = toy.weights(CFG, KEPT, slots=SLOTS)
    plan = toy.plan(CFG, drafter, TREE, Sampling(1.0))
    prompt = np.random.default_rng(3).integers(0, 12, 70)
    tokens, state = toy.decode(plan, w, prompt, 60, Sampling(1.0), seed=4)
    text = [*prompt.tolist(), *tokens]
    known = int(state.length) + 1 - int(state.accepted.count)  # the rest is taken in when the next round drafts
    latest = [t for t in dict.fromkeys(reversed(text[:known])) if t not in KEPT][:SLOTS]
    assert np.asarray(state.caches.draft.slots.ids).tolist() == latest and len(latest) == SLOTS
