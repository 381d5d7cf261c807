"""shared cases 18 to 20: log-probabilities."""

import json
import math

import pytest

from tests.support.server import events_of

EMOJI = "🙂 👩‍💻 你好 " * 6


def entries(events):
    return [entry for e in events for c in e["choices"] if c["logprobs"] for entry in c["logprobs"]["content"]]


@pytest.mark.parametrize("temperature", [0, 1])
def test_18_an_entry_for_each_token(toy, temperature):
    def asked(**fields):
        body = {"messages": [{"role": "user", "content": "the hint"}], "max_tokens": 40, "seed": 3, **fields}
        return {**body, "temperature": temperature, "logprobs": True, "top_logprobs": 2, "logit_bias": {"2": -100}}

    streamed = entries(toy.events("/v1/chat/completions", **asked()))
    whole = toy.chat(**{"said": "the hint", **{k: v for k, v in asked().items() if k != "messages"}})
    choice = whole["choices"][0]
    assert choice["logprobs"]["content"] == streamed
    plain = entries(toy.events("/v1/chat/completions", **asked(speculative=False)))
    assert [one["bytes"] for one in plain] == [one["bytes"] for one in streamed]
    for mine, its in zip(streamed, plain, strict=True):
        assert math.isclose(mine["logprob"], its["logprob"], abs_tol=1e-3)
        assert len(mine["top_logprobs"]) == 2 and mine["top_logprobs"][0]["logprob"] >= mine["logprob"] - 1e-6
    assert any(one["logprob"] < -0.01 for one in streamed)
    said = b"".join(bytes(one["bytes"]) for one in streamed)
    assert said.decode("utf-8", "replace") == choice["message"]["content"]
    assert len(streamed) == whole["usage"]["completion_tokens"]


@pytest.mark.sweep
@pytest.mark.material
@pytest.mark.as_shipped
def test_18_split_characters(smol):
    reply = smol.complete(EMOJI, max_tokens=24, logprobs=0)
    assert "".join(reply["choices"][0]["logprobs"]["tokens"]) and "\ufffd" not in reply["choices"][0]["text"]
    body = {"prompt": EMOJI, "temperature": 0, "max_tokens": 24, "logprobs": 0}
    text, offsets, tokens = "", [], []
    for event in smol.events("/v1/completions", **body):
        text += event["choices"][0]["text"]
        if event["choices"][0]["logprobs"]:
            offsets += event["choices"][0]["logprobs"]["text_offset"]
            tokens += event["choices"][0]["logprobs"]["tokens"]
    assert reply["choices"][0]["text"] == text and reply["choices"][0]["logprobs"]["tokens"] == tokens
    assert offsets == reply["choices"][0]["logprobs"]["text_offset"] == sorted(offsets)
    raw = b"".join(
        bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        for token in tokens
    )
    assert raw.decode() == text
    assert any(token.startswith("bytes:") for token in tokens), "no character was split, so this proves nothing"


def test_19_which_are_asked_for(toy):
    chat = {"said": "the hint", "max_tokens": 8, "seed": 1}
    for top in ({}, {"top_logprobs": 0}):
        content = toy.chat(**chat, logprobs=True, **top)["choices"][0]["logprobs"]["content"]
        assert content and all(one["top_logprobs"] == [] for one in content)
    body = {"model": "toy", "messages": [{"role": "user", "content": "x"}]}
    for wrong in ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": False, "top_logprobs": 1}):
        assert toy.refused("/v1/chat/completions", {**body, **wrong})["param"] == "top_logprobs"
    asked = {**body, "logprobs": True, "top_logprobs": 20, "top_p": 0.3, "max_tokens": 8, "logit_bias": {"9": -100}}
    reply = toy.post("/v1/chat/completions", asked)

    def none(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads(reply.text, parse_constant=none)["choices"][0]["logprobs"]["content"]
    assert all(one["logprob"] >= -9999 for entry in content for one in (entry, *entry["top_logprobs"]))
    assert toy.chat(**chat)["choices"][0]["logprobs"] is None


def test_20_the_old_form(toy):
    fields = {"max_tokens": 12, "temperature": 1, "seed": 5, "logit_bias": {"2": -100}}
    whole = toy.complete("the", logprobs=2, **fields)["choices"][0]
    logprobs = whole["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(part) for part in logprobs.values()}) == 1 and len(logprobs["tokens"]) == 12
    assert logprobs["text_offset"][0] == 0 and all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"])
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert math.isclose(top[token], value, abs_tol=1e-5)
    body = {"model": "toy", "prompt": "the"}
    assert toy.refused("/v1/completions", {**body, "logprobs": 2, "echo": True})["param"] == "echo"
    assert toy.refused("/v1/completions", {**body, "logprobs": 6})["param"] == "logprobs"
    assert toy.complete("the", echo=True, **fields)["choices"][0]["text"] == "the" + whole["text"]
    reply = toy.post("/v1/completions", {**body, "stream": True, "echo": True, **fields})
    assert "".join(event["choices"][0]["text"] for event in events_of(reply.text)) == "the" + whole["text"]
