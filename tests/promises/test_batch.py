"""A text in a batch is what it is alone: token for token, number for number, whoever sits beside it."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from frspec_jax import api, engine, prefill
from frspec_jax.api import NO_DRAFT, Draft, Request
from frspec_jax.batch import Batch
from frspec_jax.checkpoint import write_draft
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.errors import UserError
from frspec_jax.files import new_folder
from frspec_jax.penalties import Bearing, Penalties
from frspec_jax.prefill import parts_of
from frspec_jax.request import asked_of
from frspec_jax.shared_rounds import ladder
from tests.promises.test_compiled_once import programs
from tests.support import toy
from tests.support.folders import VOCAB_SIZE, checkpoint_folder

# How texts may be drafted for: with a pace and what stands in the text, or the same tree in each round.
METHODS = {
    "eagle, auto": Draft("eagle"),
    "eagle, fixed": Draft("eagle", tree=TreeConfig(6, 3, 3)),
    "eagle, copying": Draft("eagle", tree=TreeConfig(6, 3, 3), copying=True),
    "eagle, slots": Draft("eagle", vocab=40, tree=TreeConfig(6, 3, 3), context_slots=24),
    "eagle3": Draft("eagle3"),
    "medusa": Draft("medusa"),
    "text alone": Draft("none", copying=True),
    "none": NO_DRAFT,
}
REQUESTS = 40  # of each method


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    checkpoint = checkpoint_folder(tmp_path_factory.mktemp("batch") / "toy")
    for kind in ("eagle3", "medusa"):
        shape, params = toy.DRAFTS[kind](checkpoint.config, 1)
        with new_folder(checkpoint.path / "drafts" / kind) as folder:
            write_draft(folder, shape, params, checkpoint.fingerprint, {"source": "toy"})
    return checkpoint


@pytest.fixture(scope="module")
def alone(checkpoint):
    """A prompt of ids and a request to the tokens, and their log-probabilities, that vanilla decoding emits."""
    model = api.load(checkpoint, NO_DRAFT, context=250)
    plan = dataclasses.replace(model.plan(), rule="mixed", adjusts=True, logprobs=True)

    def decoded(ids: np.ndarray, request: Request) -> tuple[list[int], np.ndarray]:
        penalties = Penalties.of(request.sampling, Bearing.of(request.sampling, ids, VOCAB_SIZE))
        caches, asked = model._new_caches(plan), asked_of(request, model.check(ids, request))
        chunks = model.runtime.chunks
        state = prefill.start(plan, model.weights, caches, ids, asked, chunks=chunks, penalties=penalties)
        state = engine.run(plan, model.weights, state, np.int32(10_000))
        count = int(state.emitted)
        return np.asarray(state.output)[:count].tolist(), np.asarray(state.likelihood.logprob)[:count]

    return decoded


def some_request(rng: np.random.Generator) -> tuple[np.ndarray, Request]:
    """Any prompt, and a request of which each setting may be off."""

    def maybe(value):
        return value if rng.random() < 0.4 else None

    bias = tuple((int(token), float(rng.normal() * 4)) for token in rng.integers(0, VOCAB_SIZE, 3))
    figures = {
        "temperature": maybe(rng.uniform(0.3, 1.5)),
        "top_k": maybe(int(rng.integers(1, 40))),
        "top_p": maybe(rng.uniform(0.3, 1.0)),
        "min_p": maybe(rng.uniform(0.0, 0.2)),
        "repetition_penalty": maybe(rng.uniform(0.7, 1.5)),
        "presence_penalty": maybe(rng.uniform(-1, 2)),
        "frequency_penalty": maybe(rng.uniform(-0.5, 1)),
        "logit_bias": maybe(bias),
    }
    sampling = Sampling(**{name: value for name, value in figures.items() if value is not None})
    request = Request(
        max_new_tokens=int(rng.integers(1, 40)),
        sampling=sampling,
        seed=int(rng.integers(-(2**63), 2**63)),
        sequence=int(rng.integers(0, 3)),
        logprobs=maybe(int(rng.integers(0, 5))),
    )
    # Few tokens, so that there is something to look up.
    return rng.integers(3, 3 + rng.choice([4, 200]), rng.integers(1, 90)).astype(np.int32), request


@pytest.mark.sweep(quick=["eagle, auto"])
@pytest.mark.parametrize("method", METHODS)
def test_a_text_is_what_it_is_alone(checkpoint, alone, method):
    """Whatever its neighbours, the slot, the order in which they came, and who gave up beside it."""
    rng = np.random.default_rng(7)
    model = api.load(checkpoint, METHODS[method], context=250)
    batch = Batch(model, slots=3, sizes=(1, 3) if method == "eagle, auto" else (3,))
    asked = [some_request(rng) for _ in range(REQUESTS)]
    prefix = asked[0][0]
    asked = [(np.concatenate([prefix, ids]), r) if rng.random() < 0.3 else (ids, r) for ids, r in asked]
    waiting, running, left, done = list(range(REQUESTS)), {}, set(), {}
    tokens, logprobs = [[] for _ in asked], [[] for _ in asked]
    while waiting or batch.busy:
        while waiting and batch.free and rng.random() < 0.7:
            number = waiting.pop(0)
            running[batch.admit(*asked[number])] = number
        if running and rng.random() < 0.02:
            slot = int(rng.choice(list(running)))
            batch.cancel(slot)
            left.add(running.pop(slot))
        for fresh in batch.step():
            number = running[fresh.slot]
            tokens[number] += fresh.tokens
            assert len(fresh.origins) == len(fresh.tokens)
            assert (fresh.logprobs is None) == (asked[number][1].logprobs is None)
            logprobs[number] += fresh.logprobs or ()
            if fresh.finish_reason is not None:
                done[number] = fresh
                del running[fresh.slot]
    assert batch.free == 3 and len(done) + len(left) == REQUESTS
    drafted = 0
    for number, (ids, request) in enumerate(asked):
        expected, likely = alone(ids, request)
        if number in left:
            assert tokens[number] == expected[: len(tokens[number])]
            continue
        assert tokens[number] == expected == done[number].result.tokens
        assert done[number].finish_reason == ("stop" if expected[-1] in checkpoint.stop_ids else "length")
        drafted += len(expected) - 1 - done[number].result.rounds
        if request.logprobs is not None:
            np.testing.assert_allclose([one.logprob for one in logprobs[number]], likely, atol=2e-4)
            assert all(len(one.top) == request.logprobs for one in logprobs[number])
    if method not in ("none", "eagle, auto"):
        assert drafted > 0, "nothing was ever drafted, so this test proves little"


@pytest.mark.sweep
def test_one_program_for_all_requests(checkpoint):
    """Warmed up, a batch compiles nothing more, whatever is asked of it."""
    rng = np.random.default_rng(3)
    batch = Batch(api.load(checkpoint, "eagle", context=250), slots=2)
    batch.warm_up()
    with programs() as made:
        for _ in range(12):
            batch.admit(*some_request(rng))
            while batch.busy and not (batch.free and rng.random() < 0.5):
                batch.step()
        while batch.busy:
            batch.step()
    assert made == []


@pytest.mark.sweep
def test_a_prompt_that_was_read_is_not_read_again(checkpoint, alone):
    """In the slot that holds its beginning, and beside a text that goes on in it; to the token as if read anew."""
    model = api.load(checkpoint, "eagle", context=1000)
    batch = Batch(model, slots=2, sizes=(2,))
    rng, short = np.random.default_rng(0), model.runtime.chunks.short
    head = rng.integers(3, VOCAB_SIZE, 3 * short + 5).astype(np.int32)
    prompts = [np.concatenate([head, rng.integers(3, VOCAB_SIZE, 9).astype(np.int32)]) for _ in range(3)]

    def chunks_of(slot: int) -> int:
        return len(batch._texts[slot].left)

    whole = len(parts_of(prompts[0], model.runtime.chunks, model.capacity))
    first = batch.admit(prompts[0], Request(4))
    assert chunks_of(first) == whole
    answers = run_to_end(batch)
    second = batch.admit(prompts[1], Request(30))
    assert second == first and chunks_of(second) == 1
    batch.step()
    third = batch.admit(prompts[2], Request(4))
    assert third != second and chunks_of(third) == 1
    answers |= run_to_end(batch)
    assert answers[second] == alone_with(model, prompts[1], 30)
    assert answers[third] == alone_with(model, prompts[2], 4)
    # A prompt that is there whole, and one that goes on from an answer.
    again = batch.admit(prompts[1], Request(4))
    assert chunks_of(again) == 1
    batch.cancel(again)
    longer = np.concatenate([prompts[1], np.asarray(answers[second][:-1], np.int32), prompts[2][:200]])
    slot = batch.admit(longer, Request(6))
    assert chunks_of(slot) < len(parts_of(longer, model.runtime.chunks, model.capacity))
    assert run_to_end(batch)[slot] == alone_with(model, longer, 6)


def run_to_end(batch: Batch) -> dict[int, list[int]]:
    """The whole answers by slot."""
    done = {}
    while batch.busy:
        done |= {fresh.slot: fresh.result.tokens for fresh in batch.step() if fresh.result is not None}
    return done


def alone_with(model: api.Generator, ids: np.ndarray, limit: int) -> list[int]:
    return model.generate_ids(ids, Request(limit)).tokens


@pytest.mark.sweep
def test_nobody_waits_for_a_long_prompt(checkpoint):
    """While it is read, the others have a round after each chunk."""
    model = api.load(checkpoint, NO_DRAFT, context=1000)
    batch = Batch(model, slots=2, sizes=(2,))
    batch.admit(np.arange(3, 9), Request(200))
    batch.step()
    slot = batch.admit(np.arange(900) % 200 + 3, Request(3))
    brought = []
    while batch._texts[slot].left:
        brought.append(bool(batch.step()))
    assert len(brought) > 3 and all(one or other for one, other in itertools.pairwise(brought))


def test_what_a_batch_refuses(checkpoint):
    model = api.load(checkpoint, NO_DRAFT, context=250)
    with pytest.raises(UserError, match="slots 0 must be at least 1"):
        Batch(model, slots=0)
    batch = Batch(model, slots=1)
    with pytest.raises(UserError, match=f"logit_bias {VOCAB_SIZE}:1: the model's token ids are 0 to"):
        batch.admit(np.arange(3), Request(4, Sampling(logit_bias=((VOCAB_SIZE, 1.0),))))
    with pytest.raises(UserError, match="typical is not for batches"):
        batch.admit(np.arange(3), Request(4, Sampling(0.5, typical=0.1)))
    with pytest.raises(UserError, match="leaves room for at most 249"):
        batch.admit(np.arange(250) % 7, Request(4))
    batch.admit(np.arange(3), Request(4))
    with pytest.raises(ValueError, match="no slot is free"):
        batch.admit(np.arange(3), Request(4))


def test_programs_for_fewer_texts():
    assert [ladder(slots) for slots in (1, 2, 5, 8)] == [(1,), (1, 2), (1, 2, 4, 5), (1, 2, 4, 8)]


def test_a_pool_is_never_copied(checkpoint):
    """Neither by a round nor by a prompt's chunk: each slot is written in place."""
    from frspec_jax import batched

    batch = Batch(api.load(checkpoint, Draft("eagle", tree=TreeConfig(6, 3, 3)), context=600), slots=3, sizes=(3,))
    places = np.arange(3, dtype=np.int32)
    text = batched.decode.lower(batch._plan, batch.model.weights, batch._state, places).compile().as_text()
    pool = batch._state.caches.target[0].keys
    shape = f"f32[{','.join(map(str, pool.shape))}]"
    assert shape in text, "no pool in the program, so this test proves nothing"
    copies = [line for line in text.splitlines() if f"= {shape}" in line and " copy(" in line]
    assert copies == []
    assert jax.tree.leaves(batch._state)
