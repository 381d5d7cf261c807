"""The demo's model and the draft that ships: the promises on a real vocabulary."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from eval.data.questions import read_questions
from eval.methods.peers import Peer
from frspec_jax import Request, Sampling, api, drafting
from frspec_jax.config import TreeConfig
from tests import conftest

pytestmark = pytest.mark.material
QUESTIONS = [question.turns[0] for question in read_questions(None)]
ASKED = QUESTIONS[1:5]


@pytest.fixture(scope="module")
def vanilla(real_checkpoint):
    return api.load(real_checkpoint, "none")


@pytest.fixture(scope="module")
def fr_spec(real_checkpoint, vanilla):
    return api.load(real_checkpoint, "eagle", target=vanilla.weights.target)


@pytest.fixture(scope="module")
def plain(vanilla):
    """Vanilla's greedy answers to the questions from the second on."""
    return [vanilla.generate(text, Request(max_new_tokens=32)).tokens for text in ASKED[1:]]


@pytest.fixture(scope="module")
def drafted(fr_spec):
    """The draft's to all of them, and longer."""
    return [fr_spec.generate(text, Request(max_new_tokens=48)) for text in ASKED]


@pytest.mark.as_shipped
def test_greedy_output_is_that_of_transformers(vanilla, plain, drafted, gguf_path):
    peer = Peer(gguf_path, vanilla.checkpoint.stop_ids)
    for text, alone, result in zip(ASKED[1:], plain, drafted[1:], strict=True):
        prompt = vanilla.encode(text)
        expected, _ = peer.generate(prompt, 32)
        for tokens in (alone, result.tokens[:32]):
            if tokens != expected:
                at = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b)
                assert peer.gap([*prompt.tolist(), *expected[:at]]) < 1e-3


@pytest.mark.sweep
@pytest.mark.parametrize("draft_vocab", ["full", 4096])
def test_sampling_with_a_seed_is_vanillas(real_checkpoint, vanilla, draft_vocab):
    tree = TreeConfig(8, 3, 4)
    model = api.load(real_checkpoint, api.Draft("eagle", vocab=draft_vocab, tree=tree), target=vanilla.weights.target)
    request = Request(max_new_tokens=24, sampling=Sampling(1.0), seed=3)
    for text in QUESTIONS[:2]:
        assert model.generate(text, request).tokens == vanilla.generate(text, request).tokens


@pytest.mark.as_shipped
@pytest.mark.sweep
@pytest.mark.parametrize("settings", [Sampling(), Sampling(1.0)])
def test_bfloat16_is_vanillas_too(real_checkpoint, settings):
    """On a CPU with AMX, where it is the default, a token rounds alike alone and in a tree (docs/kernels.md)."""
    if not conftest.HAS_AMX:
        pytest.skip("without AMX a CPU rounds bfloat16 otherwise, and float32 is its default (docs/kernels.md)")
    vanilla = api.load(real_checkpoint, "none", dtype=jnp.bfloat16)
    request = Request(max_new_tokens=96, sampling=settings, seed=1)
    for tree in (TreeConfig(8, 3, 4), TreeConfig(24, 5, 8)):
        model = api.load(
            real_checkpoint, api.Draft("eagle", tree=tree), target=vanilla.weights.target, dtype=jnp.bfloat16
        )
        for text in QUESTIONS[:2]:
            assert model.generate(text, request).tokens == vanilla.generate(text, request).tokens


@pytest.mark.as_shipped
def test_the_draft_that_ships_is_of_use(drafted):
    """Far below what it reaches (see its model card), far above what a broken one would."""
    tokens, rounds = sum(len(r.tokens) - 1 for r in drafted), sum(r.rounds for r in drafted)
    assert tokens / rounds > 1.4


@pytest.mark.as_shipped
def test_the_sub_vocabulary_covers_the_answers(real_checkpoint, plain):
    ids = set(drafting.draft_ids(real_checkpoint, api.Draft(vocab=12288)).tolist())
    assert len(ids) == 12288 and set(real_checkpoint.stop_ids) <= ids
    tokens = [t for answer in plain for t in answer]
    assert sum(t in ids for t in tokens) / len(tokens) > 0.85
