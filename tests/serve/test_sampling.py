"""shared cases 11 to 17: what a request's figures change, and that they change no other's."""

import concurrent.futures
import itertools
import json

import openai
import pytest

from frspec_jax.config import Sampling
from frspec_jax.generator import Request
from tests.serve.test_stops import GOES_ON, N

PROMPT = "the hint"


def text(server, prompt=PROMPT, **fields):
    return server.complete(prompt, **fields)["choices"][0]["text"]


def together(calls):
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


def test_11_neighbours_change_nothing(toy):
    def seeded(n):
        return lambda: text(toy, temperature=0.8, seed=n, max_tokens=30)

    alone = [seeded(n)() for n in range(1, 9)]
    unseeded = [lambda: text(toy, temperature=0.8, max_tokens=20) for _ in range(2)]
    calls = [seeded(n) for n in range(1, 9)]
    assert together([*calls, *unseeded])[:8] == alone
    shuffled = [calls[n] for n in (5, 2, 7, 0, 3, 6, 1, 4)]
    assert together([unseeded[0], *shuffled])[1:] == [alone[n] for n in (5, 2, 7, 0, 3, 6, 1, 4)]
    ids = toy.served.encoder.text(PROMPT)
    generated = [toy.model.generate_ids(ids, Request(30, Sampling(0.8), seed=n)).text for n in range(1, 9)]
    assert generated == alone and len(set(alone)) > 4


def test_12_seeds(toy):
    def drawn(seed):
        return text(toy, temperature=1, seed=seed, max_tokens=20)

    # Texts that end at once are often one and the same replacement character: none may end before its 20 tokens.
    unseeded = [text(toy, temperature=1, max_tokens=20, logit_bias={"2": -100}) for _ in range(5)]
    assert len(set(unseeded)) == 5
    seeds = (2**40, 2**63 - 1, -1, -(2**63), 7, 7 + 2**32)
    drawings = [drawn(seed) for seed in seeds]
    assert drawings == [drawn(seed) for seed in seeds] and len(set(drawings)) == len(seeds)
    for wrong in (1.5, 2**63, "7", True):
        body = {"model": "toy", "prompt": PROMPT, "seed": wrong}
        assert toy.refused("/v1/completions", body)["param"] == "seed"


def test_13_several_choices(toy):
    def choices(**fields):
        reply = toy.chat("hello", n=3, seed=7, temperature=1, max_tokens=16, **fields)
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
        return reply, [choice["message"]["content"] for choice in reply["choices"]]

    reply, texts = choices()
    assert len(set(texts)) == 3 and texts == choices()[1]
    one = toy.chat("hello", seed=7, temperature=1, max_tokens=16)
    assert one["choices"][0]["message"]["content"] == texts[0]
    assert reply["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    body = {"messages": [{"role": "user", "content": "hello"}], "n": 3, "seed": 7, "temperature": 1, "max_tokens": 16}
    events = toy.events("/v1/chat/completions", **body)
    for index, whole in enumerate(texts):
        mine = [c for event in events for c in event["choices"] if c["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in mine) == whole
        assert [c["delta"].get("role") for c in mine].count("assistant") == 1
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [reply["choices"][index]["finish_reason"]]


def test_14_settings_reach_no_neighbour(toy):
    asked = [
        {"temperature": 0, "top_p": 0.1, "seed": 5},
        {"temperature": 1.5, "top_p": 0.5, "seed": 6},
        {"temperature": 1, "top_k": 1, "seed": 7},
        {"temperature": 1, "min_p": 0.2, "seed": 8},
        {"temperature": 1, "top_p": 0, "seed": 9},
    ]
    alone = [text(toy, max_tokens=24, **fields) for fields in asked]
    calls = [lambda fields=fields: text(toy, max_tokens=24, **fields) for fields in asked]
    assert together(calls) == alone == together(calls[::-1])[::-1]
    greedy = text(toy, max_tokens=24)
    assert alone[0] == alone[2] == alone[4] == greedy
    assert alone[1] != greedy


NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def test_15_numbers_that_are_none(toy):
    before = len(toy.batch.admitted)
    for name, value, stream in itertools.product(NUMBERS, ("NaN", "Infinity", "-Infinity", "1e400"), ("true", "false")):
        body = f'{{"model": "toy", "prompt": "x", "stream": {stream}, "{name}": {value}}}'
        assert toy.refused("/v1/completions", body.encode())["param"] == name
    out_of_range = {"temperature": 2.5, "top_p": 1.5, "min_p": 1, "presence_penalty": 2.5, "n": 0, "top_k": -2}
    for name, value in out_of_range.items():
        assert toy.refused("/v1/completions", {"model": "toy", "prompt": "x", name: value})["param"] == name
    half = b'{"model": "toy", "messages": [{"role": "user", "content": "\\ud83d"}]}'
    assert toy.refused("/v1/chat/completions", half)["param"] == "messages[0].content"
    assert toy.refused("/v1/completions", b'{"model": "\\ud83d", "prompt": "x"}')["param"] == "model"
    assert len(toy.batch.admitted) == before


def test_16_penalties(toy):
    for name, value in (("frequency_penalty", 2), ("frequency_penalty", -2), ("presence_penalty", 2)):
        drafted = text(toy, max_tokens=60, **{name: value})
        assert drafted == text(toy, max_tokens=60, speculative=False, **{name: value})
    assert text(toy, max_tokens=60, repetition_penalty=1.8) != text(toy, max_tokens=60)


@pytest.mark.material
@pytest.mark.as_shipped
def test_16_penalties_of_the_real_model(smol):
    """A comma may come once at a price, and less and less often: each accepted token counts."""
    plain, penalised = (text(smol, N, max_tokens=24, frequency_penalty=value) for value in (0, 2))
    assert plain == GOES_ON and penalised.count(",") < plain.count(",")


def test_17_biases(toy):
    letter = json.dumps(toy.served.encoder.text("e").tolist()[0])
    assert "e" not in text(toy, max_tokens=60, temperature=1, seed=1, logit_bias={letter: -100}).replace("the", "")
    drafted = text(toy, max_tokens=30, logit_bias={letter: 4.5})
    assert drafted == text(toy, max_tokens=30, logit_bias={letter: 4.5}, speculative=False)
    for key, value in (("49152", 5), ("-1", 1), ("x", 1), ("28", 500), ("28", "5"), ("²", 1)):
        error = toy.refused("/v1/completions", {"model": "toy", "prompt": "x", "logit_bias": {key: value}})
        assert error["param"] == f"logit_bias.{key}"


@pytest.mark.material
@pytest.mark.as_shipped
def test_17_no_comma(smol):
    assert "," not in text(smol, N, max_tokens=24, logit_bias={"28": -100})


def test_the_client_of_openai(toy):
    client = toy.client()
    chat = client.chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "hello"}],
        n=2,
        seed=4,
        max_completion_tokens=9,
        presence_penalty=0.5,
        stop=["zzz"],
        user="somebody",
    )
    assert len(chat.choices) == 2 and chat.usage is not None and chat.usage.total_tokens > chat.usage.prompt_tokens
    parts = list(client.completions.create(model="toy", prompt="the", stream=True, max_tokens=5, seed=1))
    whole = client.completions.create(model="toy", prompt="the", max_tokens=5, seed=1)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="toy", prompt="x", temperature=3)
    assert refused.value.param == "temperature"
