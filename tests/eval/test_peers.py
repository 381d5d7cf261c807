"""The peer: what it answers, and that its tokens, rounds and times are counted as ours are."""

from __future__ import annotations

import numpy as np
import pytest

from eval.methods import peers
from frspec_jax.errors import UserError
from tests.support.tiny_hf import model_of, save


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A tiny random model, which repeats itself sooner or later: so prompt lookup is right at times."""
    folder = save(model_of(), tmp_path_factory.mktemp("peer") / "tiny")
    return peers.Peer(folder, (0,))


PROMPT = np.array([5, 6, 7, 8, 5, 6], np.int32)


def test_greedy_takes_a_pass_a_token(found):
    result = found.answer(PROMPT, 24)
    assert result.first == 1 and 1 <= len(result.tokens) <= 24
    assert result.rounds == len(result.tokens) - 1
    assert result.prefill_seconds > 0 and result.decode_seconds >= 0
    tokens, seconds = found.generate(PROMPT, 24)
    assert tokens == result.tokens and seconds > 0


def test_prompt_lookup_says_the_same_in_no_more_passes(found):
    plain, looked_up = found.answer(PROMPT, 48), found.answer(PROMPT, 48, lookup=True)
    assert looked_up.tokens == plain.tokens
    assert looked_up.first >= 1 and looked_up.rounds <= plain.rounds


def test_the_gap_is_between_the_two_best(found):
    import torch

    with torch.inference_mode():
        scores = np.sort(found._model(torch.tensor(PROMPT[None].astype(np.int64))).logits[0, -1].numpy())
    assert found.gap(PROMPT.tolist()) == pytest.approx(float(scores[-1] - scores[-2]), abs=1e-5)


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"peer .* is no file or folder"):
        peers.check(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        peers.Peer(tmp_path / "empty", (0,))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="peer needs torch"):
        peers.check(tmp_path)
