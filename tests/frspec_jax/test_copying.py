"""Copying: what is found in the text, what that does to a draft's distribution, and what it brings."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from eval.methods import side_by_side
from eval.runs import manifest
from frspec_jax import drafters, stages
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.drafters import copying
from frspec_jax.drafters.beam import BeamDrafter
from frspec_jax.drafters.copying import LONGEST, MATCHES, Copying
from frspec_jax.errors import UserError
from tests.support import toy
from tests.support.folders import checkpoint_folder

SOME = Copying(gain=5.0, longer=1.5, reach=40.0, doubt=0.4)


def looked_up(text: list[int], last: list[int], here: int) -> list[tuple[int, float]]:
    """(what followed, its weight) of the longest and latest matches, by plain loops; the first token is unknown."""
    found = []
    for place in range(len(text) - 1):
        length = 0
        while length < LONGEST and place - length > 0 and text[place - length] == last[length]:
            length += 1
        if length:
            found.append((length, place))
    best = sorted(found, reverse=True)[:MATCHES]
    weight = [np.exp(SOME.longer * (length - 1) - (here - place) / SOME.reach) for length, place in best]
    return [(text[place + 1], w / (sum(weight) + SOME.doubt)) for (_, place), w in zip(best, weight, strict=True)]


@pytest.mark.parametrize("seed", range(4))
def test_followers_are_those_of_the_longest_and_latest_matches(seed):
    rng = np.random.default_rng(seed)
    length = 150
    text = rng.integers(0, 4 + 8 * seed, length + 1).tolist()
    tokens = np.append(text, rng.integers(0, 4, 60)).astype(np.int32)  # what stands behind the text is of no meaning
    last = np.array([text[::-1][:LONGEST], *rng.integers(0, 4 + 8 * seed, (5, LONGEST))], np.int32)
    here = np.array([length, *range(length + 1, length + 6)])
    follows, longest, age = jax.jit(copying.followers)(tokens, jnp.int32(length), last, here)
    weight = copying.weighed(SOME, longest, age)
    for row in range(6):
        expected = looked_up(text, last[row].tolist(), int(here[row]))
        real = np.asarray(follows[row]) >= 0
        assert np.asarray(follows[row])[real].tolist() == [token for token, _ in expected]
        np.testing.assert_allclose(np.asarray(weight[row])[real], [w for _, w in expected], rtol=1e-5)
        assert not np.asarray(weight[row])[~real].any()


def test_a_text_without_a_match_gives_nothing():
    tokens = jnp.arange(64, dtype=jnp.int32)
    follows, longest, age = copying.followers(tokens, jnp.int32(40), jnp.array([[90, 91, 92]]), jnp.array([40]))
    assert (np.asarray(follows) == -1).all()
    assert not np.asarray(copying.weighed(SOME, longest, age)).any()


def test_the_last_tokens_end_where_the_text_begins():
    tokens = jnp.array([-1, 5, 6, 7, 8, 9], jnp.int32)
    assert copying.recent(tokens, jnp.int32(4)).tolist() == [8, 7, 6]
    assert copying.recent(tokens, jnp.int32(2)).tolist() == [6, 5, -2]
    assert copying.recent(tokens, jnp.int32(0)).tolist() == [-2, -2, -2]


@pytest.mark.parametrize("cropped", [False, True])
def test_raised_tokens_are_those_of_a_softmax_over_raised_logits(cropped):
    """Against the whole vocabulary in float64: a token outside V' that stands in the text joins the softmax."""
    rng, vocab, k = np.random.default_rng(int(cropped)), 40, 6
    logits = rng.normal(size=(3, vocab)) * 2
    inside = np.ones(vocab, bool)
    if cropped:
        inside[rng.permutation(vocab)[:15]] = False
    follows = rng.integers(0, vocab, (3, MATCHES)).astype(np.int32)
    follows[1, 4:], follows[2] = -1, -1  # few matches, and none
    weight = np.where(follows >= 0, rng.random((3, MATCHES)) / MATCHES, 0.0).astype(np.float32)

    log_z = special.logsumexp(np.where(inside, logits, -np.inf), axis=-1, keepdims=True)
    own = np.where(inside, logits - log_z, -np.inf)
    best = np.argsort(-own, axis=-1)[:, :k]
    said = np.take_along_axis(logits - log_z, np.maximum(follows, 0), axis=-1)
    rise = copying.rises(SOME, jnp.asarray(follows), jnp.asarray(weight))
    scores, tokens = copying.raised(
        jnp.asarray(np.take_along_axis(own, best, -1), jnp.float32),
        jnp.asarray(best, jnp.int32),
        jnp.asarray(follows),
        jnp.asarray(said, jnp.float32),
        jnp.asarray(inside[follows]),
        rise,
    )

    for row in range(3):
        total = np.where(inside, logits[row], -np.inf)
        for token in {int(t) for t in follows[row] if t >= 0}:
            total[token] = logits[row, token] + SOME.gain * weight[row][follows[row] == token].sum()
        expected = special.log_softmax(total)
        order = np.argsort(-expected)[:k]
        assert np.asarray(tokens[row]).tolist() == order.tolist()
        np.testing.assert_allclose(np.asarray(scores[row]), expected[order], atol=1e-5)


@pytest.mark.sweep
def test_the_text_is_remembered():
    """After rounds of several tokens, and a prompt in chunks: every token but the first, which it is never told."""
    cfg = toy.config(vocab_size=12)
    w, drafter = toy.weights(cfg, kind="copying")
    plan = toy.plan(cfg, drafter, TreeConfig(8, 3, 4), Sampling(1.0))
    prompt = np.random.default_rng(0).integers(0, 12, 70)
    tokens, state = toy.decode(plan, w, prompt, 60, Sampling(1.0), seed=1)
    text = [*prompt.tolist(), *tokens]
    known = int(state.length) + 1
    assert known > 100 and int(state.rounds) < 59
    assert np.asarray(state.caches.text)[1:known].tolist() == text[1:known]


def test_a_text_that_repeats_is_drafted_in_fewer_rounds():
    """This text of the toy model ends in one token over and over, which its draft is wrong about."""
    cfg = toy.config()
    rounds, tree = {}, TreeConfig(8, 3, 4)
    for kind in ("eagle", "copying"):
        w, drafter = toy.weights(cfg, kind=kind)
        if kind == "copying":  # random weights make logits of several hundred
            drafter = dataclasses.replace(drafter, copying=Copying(gain=3000.0))
        tokens, state = toy.decode(toy.plan(cfg, drafter, tree, Sampling()), w, np.tile([3, 5, 1], 6), 120)
        assert len(set(tokens[60:])) == 1
        rounds[kind] = int(state.rounds)
    assert rounds["eagle"] > 110 and rounds["copying"] < 50


@pytest.mark.sweep
def test_what_is_copied_may_lie_outside_the_sub_vocabulary():
    cfg = toy.config(vocab_size=12)
    ids = np.array([0, 1, 2, 3], np.int32)
    for kind, some_outside in (("eagle", False), ("copying", True)):
        w, drafter = toy.weights(cfg, ids, kind=kind)
        assert isinstance(drafter, BeamDrafter)
        plan = toy.plan(cfg, drafter, TreeConfig(20, 3, 4), Sampling())
        prompt = np.tile([7, 8, 9, 5, 11, 6, 10], 6)
        _, state = toy.decode(plan, w, prompt, 2)
        tree, _ = jax.jit(stages.draft, static_argnames="plan")(plan, w, state)
        assert bool(set(np.asarray(tree.tokens[1:]).tolist()) - set(ids.tolist())) == some_outside


def test_how_a_draft_copies_is_part_of_its_config():
    spec, _ = toy.draft(toy.config())
    assert drafters.spec_of(json.loads(json.dumps(spec.to_json())), "config.json") == spec
    assert spec.copies(True).copying == Copying()
    fitted = drafters.spec_of({**spec.to_json(), "copying": {"gain": 4.0, "reach": 90.0}}, "config.json")
    assert fitted.copies(True).copying == Copying(gain=4.0, reach=90.0)
    assert fitted.copies(False) == spec
    with pytest.raises(UserError, match="damaged"):
        drafters.spec_of({**spec.to_json(), "copying": {"gain": 4.0, "rech": 90.0}}, "config.json")


@pytest.mark.parametrize("kind", ["eagle3", "medusa"])
def test_other_kinds_do_not_copy(kind):
    spec, _ = toy.DRAFTS[kind](toy.config())
    assert spec.copies(False) == spec
    with pytest.raises(UserError, match=f"Draft.copying on: a draft of kind {kind} does not copy"):
        spec.copies(True)


def test_methods_are_measured_without_and_with_it(tmp_path):
    checkpoint = checkpoint_folder(tmp_path / "toy")
    found = side_by_side.methods(checkpoint, side_by_side.varied([None], ["full", 64], None, copying=(False, True)))
    assert list(found) == ["vanilla", "EAGLE-2", "FR-Spec 64", "EAGLE-2 + copying", "FR-Spec 64 + copying"]
    facts = manifest.of_models(checkpoint, found)["methods"]
    assert facts["FR-Spec 64 + copying"]["copying"] == dataclasses.asdict(Copying())
    assert "copying" not in facts["FR-Spec 64"] and "copying" not in facts["vanilla"]
