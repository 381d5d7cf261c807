"""How conversations begin: what `train answers` asks, once each; and what it passes over, with its count."""

from __future__ import annotations

import json

import pytest

from tests.support.folders import checkpoint_folder
from train.__main__ import main
from train.corpus import Tally
from train.features import FeatureStore
from train.first_prompts import first_prompts, prompt_ids


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return checkpoint_folder(tmp_path_factory.mktemp("first") / "toy", draft=False, ranking=False)


def corpus(file, *conversations, **beside):
    turns = [[{"role": role, "content": text} for role, text in one] for one in conversations]
    file.write_text("".join(json.dumps({"messages": one, **beside}) + "\n" for one in turns))
    return file


def test_conversations_that_differ_in_their_system_message_alone_are_all_asked(ckpt, tmp_path):
    asked = [[("system", f"You are number {n}."), ("user", "Who are you?"), ("assistant", "ME")] for n in range(60)]
    tally = Tally()
    found = list(first_prompts([corpus(tmp_path / "systems.jsonl", *asked, asked[0])], tally))
    assert len(found) == 60
    assert tally.said() == "read 61 records; left out 1: they begin as an earlier one (first: systems.jsonl, line 61)"
    said = ckpt.tokenizer.decode(prompt_ids(found[7], ckpt, tally))
    assert "You are number 7." in said and said.endswith("Who are you?<|im_end|>\n<|im_start|>assistant\n")


def test_tools_and_developers_belong_to_the_beginning_and_what_follows_does_not(tmp_path):
    one = [("developer", "Be brief."), ("user", " Hi? "), ("assistant", "a"), ("user", "So?")]
    (found,) = first_prompts([corpus(tmp_path / "a.jsonl", one, tools=[{"name": "sum"}])], Tally())
    assert [dict(message) for message in found.messages] == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi?"},
    ]
    assert found.tools == [{"name": "sum"}] and found.text == "Hi?"


def test_what_is_passed_over_is_counted_at_the_end(ckpt, tmp_path, capsys):
    file = corpus(
        tmp_path / "a.jsonl",
        [("user", "the cat?")],
        [("user", "the end of it " * 40)],
        [("assistant", "Nobody asked.")],
        [("user", "the cat?"), ("assistant", "again")],
    )
    argv = ["answers", file, "--ckpt", ckpt.path, "--out", tmp_path / "store", "--max-new-tokens", 4, "--capacity", 128]
    main([str(arg) for arg in argv])
    assert len(FeatureStore(tmp_path / "store", ckpt)) == 1
    counted, following = capsys.readouterr().err.strip().splitlines()[-2:]
    assert following.startswith("next: ") and counted == (
        "read 4 records; left out 1: their prompts are longer than 112 tokens (--capacity) (first: a.jsonl, line 2); "
        "left out 1: no user asks anything in them (first: a.jsonl, line 3); "
        "left out 1: they begin as an earlier one (first: a.jsonl, line 4)"
    )


def test_a_target_without_a_template_goes_on_with_the_text(ckpt, tmp_path, monkeypatch):
    (found,) = first_prompts([corpus(tmp_path / "a.jsonl", [("user", "the cat")])], Tally())
    monkeypatch.setattr(ckpt.tokenizer, "chat_template", None)
    assert ckpt.tokenizer.decode(prompt_ids(found, ckpt, Tally())) == "the cat"
