"""shared cases 5 to 10: where an answer ends."""

import pytest

from tests.support.server import deltas

N = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,"
GOES_ON = " 11, 12, 13, 14, 15, 16,"


@pytest.mark.material
@pytest.mark.as_shipped
def test_5_a_stop_text_over_tokens_and_rounds(smol):
    events = smol.events("/v1/completions", prompt=N, temperature=0, stop=["3, 14"], max_tokens=24)
    assert deltas(events) == " 11, 12, 1" and events[-1]["choices"][0]["finish_reason"] == "stop"
    smol.idle(5)
    events = smol.events("/v1/completions", prompt=N, temperature=0, stop=["3, 19"], max_tokens=24)
    assert deltas(events) == GOES_ON and events[-1]["choices"][0]["finish_reason"] == "length"
    # Held back only while a match is possible: every text that was sent ends where none could go on.
    sent = ""
    for event in events[:-2]:
        sent += event["choices"][0]["text"]
        assert not any(sent.endswith("3, 19"[:n]) for n in range(1, 5)), sent


@pytest.mark.material
@pytest.mark.as_shipped
def test_6_which_stop_text_wins(smol):
    assert smol.refused("/v1/completions", {"model": "smollm2", "prompt": N, "stop": [""]})["param"] == "stop"
    for nothing in (None, []):
        assert smol.complete(N, stop=nothing, max_tokens=24)["choices"][0]["text"] == GOES_ON
    assert smol.complete(N, stop=["14, 15", "4"], max_tokens=24)["choices"][0]["text"] == " 11, 12, 13, 1"
    prompt = "Q: Say a.\nA: a\n\nQ: Say b.\nA: b\n\nQ: Say c.\nA:"
    answer = smol.complete(prompt, stop=["\n\nQ:"], max_tokens=40)["choices"][0]
    assert answer["finish_reason"] == "stop" and answer["text"].strip() and "Q:" not in answer["text"]


@pytest.mark.material
@pytest.mark.as_shipped
def test_7_a_stop_text_within_the_budget_beats_it(smol):
    reply = smol.complete(N, stop=["2,"], max_tokens=9)
    choice = reply["choices"][0]
    assert choice["text"] == " 11, 1" and choice["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 8


@pytest.mark.material
@pytest.mark.as_shipped
def test_8_a_text_grows_with_its_limit(smol):
    for limit in (1, 2, 3, 12):
        reply = smol.complete(N, max_tokens=limit)
        assert reply["usage"]["completion_tokens"] == limit and reply["choices"][0]["finish_reason"] == "length"
        assert GOES_ON.startswith(reply["choices"][0]["text"]) and len(reply["choices"][0]["text"]) == limit


def test_8_exactly_as_many_tokens_as_asked_for(toy):
    for limit in range(1, 13):
        fields = {"max_tokens": limit, "temperature": 0.7, "seed": 2, "logit_bias": {"2": -100}}
        drafted, vanilla = (toy.complete("the hint", speculative=drafts, **fields) for drafts in (True, False))
        assert drafted["usage"]["completion_tokens"] == limit and drafted["usage"] == vanilla["usage"]
        assert drafted["choices"] == vanilla["choices"] and drafted["choices"][0]["finish_reason"] == "length"


@pytest.mark.material
@pytest.mark.as_shipped
def test_8_nothing_after_the_end_token(smol):
    whole = smol.chat("Say only the word yes.", temperature=0)
    used = whole["usage"]["completion_tokens"]
    assert whole["choices"][0]["finish_reason"] == "stop"
    exact = smol.chat("Say only the word yes.", temperature=0, max_tokens=used)
    assert exact["choices"][0] == whole["choices"][0] and exact["usage"] == whole["usage"]
    short = smol.chat("Say only the word yes.", temperature=0, max_tokens=used - 1)
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["choices"][0]["message"] == whole["choices"][0]["message"]


def test_9_two_names_of_a_limit(toy):
    def used(**fields):
        return toy.chat("hello", seed=3, **fields)["usage"]["completion_tokens"]

    assert used(max_completion_tokens=5) == 5
    assert used(max_completion_tokens=5, max_tokens=5) == 5
    body = {"model": "toy", "messages": [{"role": "user", "content": "hello"}]}
    assert toy.refused("/v1/chat/completions", {**body, "max_tokens": 5, "max_completion_tokens": 6})["param"]
    for wrong in ({"max_tokens": -1}, {"max_completion_tokens": 0}, {"max_tokens": 1.5}, {"max_tokens": "9"}):
        assert toy.refused("/v1/chat/completions", {**body, **wrong})["param"] == next(iter(wrong))
    whole = toy.chat("hello", seed=3, max_tokens=None, logit_bias={"2": -100})  # never the end token
    assert whole["usage"]["total_tokens"] == 512 and whole["choices"][0]["finish_reason"] == "length"
    assert toy.complete("hello", logit_bias={"2": -100})["usage"]["completion_tokens"] == 16


def test_10_what_does_not_fit_the_context(toy):
    before = len(toy.batch.admitted)
    for prompt, asked in ((600, None), (450, 100), (512, 1)):
        body = {"model": "toy", "prompt": [5] * prompt, "max_tokens": asked}
        error = toy.refused("/v1/completions", body)
        assert error["code"] == "context_length_exceeded"
        assert "512" in error["message"] and str(prompt) in error["message"] and "-" not in error["message"]
        assert asked is None or str(asked) in error["message"]
    words = "word " * 600
    error = toy.refused("/v1/chat/completions", {"model": "toy", "messages": [{"role": "user", "content": words}]})
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    assert len(toy.batch.admitted) == before
    assert toy.complete([5] * 450, max_tokens=62)["usage"]["prompt_tokens"] == 450
