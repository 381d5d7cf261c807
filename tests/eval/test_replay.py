"""Replayed answers: accepted lengths are those of decoding, for every kind of draft; and coverage with slots."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from eval.methods import replay, side_by_side
from frspec_jax import api
from frspec_jax.api import Draft, Request
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import TreeConfig
from frspec_jax.vocabulary import DraftHead

TREE = TreeConfig(40, 2, 8)
DRAFTS = {
    "cropped": Draft(vocab=40, tree=TREE),
    "slots": Draft(vocab=40, tree=TREE, copying=True, context_slots=24),
}


@pytest.mark.sweep
@pytest.mark.as_shipped
def test_it_is_what_decoding_accepts(toy_folder: Checkpoint):
    vanilla = api.load(toy_folder, "none", dtype="float32", context=400)
    models = {
        name: api.load(toy_folder, draft, dtype="float32", context=400, target=vanilla.weights.target)
        for name, draft in DRAFTS.items()
    }
    request, rng, different = Request(60), np.random.default_rng(0), set()
    prompts = [rng.integers(3, 250, length).astype(np.int32) for length in (30, 290, 7)]
    given = [replay.Answered(prompt, vanilla.generate_ids(prompt, request)) for prompt in prompts]
    given[2] = dataclasses.replace(given[2], answer=vanilla.generate_ids(prompts[2], Request(9)))  # it ends before
    (found,) = replay.replayed(models, given)
    for name, model in models.items():
        for one, result in zip(given, found[name], strict=True):
            expected = model.generate_ids(one.prompt, Request(len(one.answer.tokens)))
            assert result.tokens == expected.tokens
            assert result.accepted_histogram == expected.accepted_histogram, name
            assert (result.method, result.rounds) == (expected.method, expected.rounds)
            different.add(tuple(result.accepted_histogram))
    assert len(different) > 3, "all methods accept alike: this test would prove little"


def test_what_is_covered():
    """By hand: V' is {1, 2}, and two slots hold the ids outside it that were seen last."""
    head = DraftHead(np.zeros((2, 4)), np.array([1, 2]))
    model = types.SimpleNamespace(weights=types.SimpleNamespace(draft=(head,)), context_slots=2)
    prompt, answer = np.array([7, 8, 1]), [1, 8, 9, 7, 8, 9, 2, 5]
    #                                      in, held, new, 7 went out for 9; 8 for 7; 9 for 8; in; new
    assert side_by_side.covered(model, prompt, answer) == 3
    assert side_by_side.covered(types.SimpleNamespace(**vars(model) | {"context_slots": 3}), prompt, answer) == 6
    assert side_by_side.covered(types.SimpleNamespace(**vars(model) | {"context_slots": 0}), prompt, answer) == 2
