"""Slots: which ids of a text they hold, and the head that reads them against a dense softmax."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frspec_jax import api
from frspec_jax.api import Draft, Request
from frspec_jax.batch import Batch
from frspec_jax.config import TreeConfig
from frspec_jax.drafters.base import Accepted, Turn
from frspec_jax.errors import UserError
from frspec_jax.method import Method
from frspec_jax.slots import Slots
from frspec_jax.vocabulary import WholeHead
from tests.support import toy
from tests.support.folders import VOCAB_SIZE as V_TOY

V, M, KEPT = 40, 6, np.array([3, 1, 4, 15, 9])
WHOLE = WholeHead.of(jnp.asarray(np.random.default_rng(0).normal(size=(V, 8)), jnp.float32), KEPT)
seeing = jax.jit(lambda slots, tokens, start, count: slots.seeing(tokens, start, count, WHOLE))


def latest(text: list[int], lacked: set[int]) -> tuple[list[int], list[int]]:
    """The last M ids of a text that are lacked, and where each stood last, by a plain loop."""
    last: dict[int, int] = {}
    for place, token in enumerate(text):
        if token in lacked:
            last[token] = place
    ids = sorted(last, key=lambda token: -last[token])[:M]
    return [*ids, *[-1] * (M - len(ids))], [*(last[token] for token in ids), *[-1] * (M - len(ids))]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, V))
def test_slots_hold_the_last_ids_that_the_head_lacks(seed, kinds):
    """In blocks of eight, of which only some are real, as chunks and rounds bring them; also too many ids."""
    rng = np.random.default_rng(seed)
    slots, text = Slots.empty(M), []
    for _ in range(6):
        block, count = rng.integers(0, kinds, 8).astype(np.int32), int(rng.integers(1, 9))
        slots = seeing(slots, block, np.int32(len(text)), np.int32(count))
        text += block[:count].tolist()
        ids, last = latest(text, set(range(V)) - set(KEPT.tolist()))
        assert np.asarray(slots.ids).tolist() == ids
        assert np.asarray(slots.last).tolist() == last
    assert not np.isin(slots.ids, KEPT).any()


def test_a_token_seen_again_is_seen_where_it_was():
    """A round takes in again what the prompt's chunk had already."""
    once = seeing(Slots.empty(M), np.array([20, 21, 22, 0, 0, 0, 0, 0], np.int32), np.int32(0), np.int32(3))
    twice = seeing(once, np.array([22, 0, 0, 0, 0, 0, 0, 0], np.int32), np.int32(2), np.int32(1))
    assert jax.tree.map(lambda x: x.tolist(), once) == jax.tree.map(lambda x: x.tolist(), twice)
    assert np.asarray(twice.emptied(jnp.bool_(True)).ids).tolist() == [-1] * M


def test_of_a_draft_with_a_vocabulary_of_its_own_only_that_is_held():
    """EAGLE-3: of the whole head's rows, those that are not kept, under the ids that they stand for."""
    rows = np.full(V, -1, np.int32)
    rows[[7, 30, 9, 12]] = np.arange(4)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8)), jnp.float32)
    whole = WholeHead(weight, jnp.asarray(np.isin(np.arange(V), [9])), jnp.asarray(rows))
    slots = Slots.empty(3).seeing(np.array([30, 9, 11, 7], np.int32), jnp.int32(0), jnp.int32(4), whole)
    assert np.asarray(slots.ids).tolist() == [7, 30, -1]
    np.testing.assert_array_equal(slots.head(whole).weight[:2], weight[:2])


@pytest.mark.parametrize(("kind", "int8"), [("eagle", False), ("eagle", True), ("eagle3", False)])
def test_the_draft_speaks_a_softmax_over_head_and_slots(kind, int8):
    """Level 0 of a tree, against numpy over the rows of both, in float64."""
    cfg, kept = toy.config(vocab_size=24), np.array([5, 1, 9, 3, 11, 0, 7])
    w, drafter = toy.weights(cfg, kept, kind=kind, int8=int8, slots=5)
    whole, *_ = toy.weights(cfg, kind=kind)
    memory = drafter.new_memory(256, jnp.float32)
    features = jnp.asarray(np.random.default_rng(2).normal(size=(8, (1 + len(drafter.taps)) * cfg.hidden_size)))
    text = np.array([2, 20, 5, 13, 20, 4, 1, 6, 0], np.int32)
    memory = jax.jit(drafter.prefill)(w.draft, features, text, jnp.int32(0), jnp.int32(6), memory)
    ids = np.asarray(memory.slots.ids)
    assert ids.tolist() == [4, 20, 13, 2, -1]  # not 6, which is padding
    lead = jnp.asarray(np.random.default_rng(3).normal(size=cfg.hidden_size), jnp.float32)
    tree = TreeConfig(11, 1, 10)
    turn = Turn(Accepted(features[:2], text[:2], jnp.int32(1)), jnp.int32(1), jnp.int32(6), None)
    offer = jax.jit(functools.partial(drafter.offer, tree=tree))
    candidates, _, _ = offer(w.draft, lead=lead, turn=turn, memory=memory)
    rows = np.asarray(drafter.head_input(w.draft, lead[None]), np.float64)[0]
    named = np.concatenate([kept, ids[:4]])
    logits = rows @ np.asarray(whole.draft.head.weight, np.float64)[named].T
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    order = np.argsort(-expected)[:10]
    if not int8:
        assert np.asarray(candidates.tokens).tolist() == named[order].tolist()
    mine = np.array([expected[named.tolist().index(token)] for token in np.asarray(candidates.tokens).tolist()])
    np.testing.assert_allclose(candidates.scores, mine, atol=0.2 if int8 else 1e-4)
    assert set(np.asarray(candidates.tokens).tolist()) & set(ids.tolist())


def test_names():
    method = Method("eagle", cropped=True, copying=True, paced=True, slots=512)
    assert method.name == "eagle+fr+slots512+copying+auto" and Method.parse(method.name) == method
    assert method.label(3072) == "FR-Spec 3,072 + 512 slots, auto"


def test_users_get_slots_and_a_fixed_tree_has_none(toy_folder):
    """As many as there are ids outside the sub-vocabulary, of which a toy has few."""
    tree = TreeConfig(4, 2, 2)
    for draft in (Draft(), Draft("eagle"), Draft(pace="auto"), Draft(tree=tree, pace="auto")):
        model = api.load(toy_folder, draft)
        assert model.draft_vocab == V_TOY // 4 and model.context_slots == V_TOY - V_TOY // 4
    for draft in (Draft(tree=tree), Draft(pace="fixed"), Draft(context_slots=0), Draft(vocab="full")):
        assert api.load(toy_folder, draft).context_slots == 0


def test_a_beginning_that_is_taken_from_another_slot_brings_its_ids(toy_folder):
    model = api.load(toy_folder, Draft(vocab=40, context_slots=24, pace="fixed"), context=256)
    batch = Batch(model, 2)
    prompt = np.random.default_rng(2).integers(3, 260, 80)
    batch.admit(prompt, Request(4))
    while batch.reading:
        batch.step()
    seen = np.asarray(batch._state.caches.draft.slots.ids)[0]
    assert (seen >= 0).sum() == 24
    other = batch.admit(np.append(prompt, [5, 6]), Request(4))
    assert other == 1 and np.array_equal(np.asarray(batch._state.caches.draft.slots.ids)[1], seen)


def test_what_is_asked_for_is_shown_and_refused(toy_folder):
    model = api.load(toy_folder, Draft(vocab=40, context_slots=24, pace="fixed"))
    assert (model.draft_vocab, model.context_slots) == (40, 24)
    assert api.load(toy_folder, Draft(vocab="full", context_slots=24)).context_slots == 0  # nothing is left out
    for slots in (-1, True, 1.5, 1 << 20):
        with pytest.raises(UserError, match=r"Draft\.context_slots .* must be a whole number from 0"):
            Draft(context_slots=slots)
    with pytest.raises(UserError, match=r"Draft\.context_slots 8 needs a draft"):
        api.load(toy_folder, Draft("none", context_slots=8))
