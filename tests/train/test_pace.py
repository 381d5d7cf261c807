"""Counting how often the target agrees with a draft: against plain loops, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from frspec_jax import api, drafting, lookup
from frspec_jax.api import Draft, Request
from frspec_jax.config import Sampling
from frspec_jax.pace import GRID
from frspec_jax.tree import Candidates
from tests.support.runs import chats, refusal
from train.__main__ import main
from train.pace import DOUBT, Seen, rising


def test_values_rise():
    assert rising(np.array([0.1, 0.3, 0.2, 0.9, 0.5, 0.4])).tolist() == pytest.approx([0.1, 0.25, 0.25, 0.6, 0.6, 0.6])
    assert rising(np.array([1.0, 0.0])).tolist() == [0.5, 0.5]


def test_what_was_right_is_counted(toy_folder):
    """By hand, three beams and two levels: a node counts where its parent was right, at its own probability."""
    seen = Seen(api.load(toy_folder, Draft(vocab="full", pace="auto"), dtype="float32"))
    seen.by_level = (2, 4)
    scores = np.log(np.array([0.5, 0.2, 0.5 * 0.9, 0.5 * 0.1, 0.2 * 0.5, 0.2 * 0.5], np.float32))
    offered = Candidates(np.array([7, 8, 1, 2, 3, 4]), scores, np.array([-1, -1, 0, 0, 1, 1]))
    chain = lookup.Chain(np.array([7, 1, 5, 6, 6, 6, 6]), np.int32(3))
    seen._count((offered, chain), np.array([7, 1, 9]))
    at = {round(float(p), 2): n for n, p in enumerate(GRID)}
    beam = np.zeros_like(seen.beam)
    beam[:, 0, at[0.5]] = 1
    beam[0, 0, at[0.2]] = 1
    beam[:, 1, at[0.9]] = 1
    beam[0, 1, at[0.1]] = 1
    assert np.array_equal(seen.beam[:, :2], beam[:, :2])
    assert seen.chain[:, 3, :3].tolist() == [[1, 1, 1], [1, 1, 0]]
    fitted = seen.fitted()
    assert fitted.beam[0][at[0.5]] == pytest.approx(0.5 + (1 - 0.5) / (DOUBT + 1), abs=0.06)


@pytest.mark.sweep
@pytest.mark.parametrize("vocab", ["full", 64])
def test_places_of_an_answer_are_the_rounds_that_would_be(toy_folder, vocab):
    """Forced to draft at every token, the engine itself proposes what `look_at` counts: the same hits at the root."""
    model = api.load(toy_folder, Draft(vocab=vocab, pace="auto", copying=False), dtype="float32")
    seen, request, prompt = Seen(model), Request(24), np.arange(3, 40)
    seen.look_at(prompt, request)
    answer = model.generate_ids(prompt, request).tokens
    assert seen.answers == 1 and seen.places == len(answer) - 1
    assert seen.beam[0, 0].sum() == seen.places * model.drafting.pace.growth.top_k
    assert seen.beam[1, 0].sum() <= seen.places
    assert (seen.beam[1] <= seen.beam[0]).all() and (seen.chain[1] <= seen.chain[0]).all()


def test_slots_hold_what_the_text_had_said_by_then(toy_folder, monkeypatch):
    """No id beyond V' is offered before the text has said it: what comes later is not known while decoding either."""
    model = api.load(toy_folder, Draft(vocab=64, context_slots=32, pace="auto", copying=False), dtype="float32")
    seen, request, offers = Seen(model), Request(24, sampling=Sampling(1.0), seed=3), []
    monkeypatch.setattr(seen, "_count", lambda proposed, following: offers.append(proposed[0].tokens))
    inside = set(drafting.draft_ids(model.checkpoint, Draft(vocab=64)).tolist())
    prompt = np.array([n for n in range(model.checkpoint.config.vocab_size) if n not in inside][:12])
    seen.look_at(prompt, request)
    text = [*prompt.tolist(), *model.generate_ids(prompt, request).tokens]
    beyond = [set(tokens.tolist()) - inside for tokens in offers]
    assert len(offers) == len(text) - 1 - len(prompt) and any(beyond)
    for place, ids in enumerate(beyond, len(prompt)):
        assert ids <= set(text[: place + 1])


@pytest.mark.sweep
def test_the_command_writes_what_load_reads(toy_copy, tmp_path, capsys):
    main(
        [
            "pace",
            str(chats(tmp_path / "chats.jsonl")),
            "--ckpt",
            str(toy_copy.path),
            "--answers",
            "3",
            "--max-new-tokens",
            "8",
        ]
    )
    assert "wrote" in capsys.readouterr().out
    file = toy_copy.draft_folder("eagle") / "pace.json"
    data = json.loads(file.read_text())
    assert data["about"]["answers"] == 3 and data["about"]["context_slots"] == api.load(toy_copy).context_slots
    odds = api.load(toy_copy, dtype="float32").weights.pace.odds
    np.testing.assert_allclose(odds.beam, data["beam"], rtol=1e-6)
    assert (np.diff(odds.beam, axis=-1) >= 0).all()


def test_what_cannot_be_counted_is_one_sentence(toy_copy, tmp_path, capsys):
    prompts = chats(tmp_path / "chats.jsonl")
    for flags, said in (
        (["--answers", "1"], "--answers 1 must be at least 2"),
        (["--draft", "nope"], "nope"),
        (["--max-new-tokens", "5000"], "hold no conversation that fits"),
    ):
        assert said in refusal(capsys, ["pace", prompts, "--ckpt", toy_copy.path, *flags])
    assert not (toy_copy.draft_folder("eagle") / "pace.json").exists()
