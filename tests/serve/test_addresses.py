"""shared cases 28 and 29, and thirty malformed requests: addresses, names and errors."""

import json

import openai
import pytest

from tests.support.server import error_of

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("body", [b'{"a":', b"[]", b'"x"', b""])
def test_28_bodies_that_are_no_object(toy_server, path, body):
    error = toy_server.refused(path, body)
    assert error["type"] == "invalid_request_error" and '{"a"' not in error["message"]


def test_28_addresses_and_methods(toy_server):
    for path in (CHAT, TEXT):
        reply = toy_server.get(path)
        assert reply.status_code == 405 and error_of(reply) and "POST" in reply.headers["allow"]
    for path in ("/v1/nothing", "/nothing", "/v1", "/v1/chat/completions/", "/static/../app.py", "/static/nothing"):
        reply = toy_server.get(path)
        assert reply.status_code == 404 and error_of(reply)["type"] == "invalid_request_error"
    reply = toy_server.post("/v1/models", {})
    assert reply.status_code == 405 and error_of(reply)


def test_29_names(toy):
    error = toy.refused(CHAT, {"model": "gpt-4", "messages": [USER]}, 404)
    assert error["code"] == "model_not_found" and "toy, toy-too" in error["message"] and error["param"] == "model"
    client = toy.client()
    assert [model.id for model in client.models.list()] == ["toy", "toy-too"]
    assert client.models.retrieve("toy").id == "toy"
    for call in (
        lambda: client.models.retrieve("gpt-4"),
        lambda: client.completions.create(model="gpt-4", prompt="x"),
    ):
        with pytest.raises(openai.NotFoundError) as error:
            call()
        assert error.value.code == "model_not_found"
    assert client.completions.create(model="toy-too", prompt="x", max_tokens=1).model == "toy-too"


def chat(**fields):
    return CHAT, json.dumps({"model": "toy", "messages": [USER], **fields}).encode()


def text(**fields):
    return TEXT, json.dumps({"model": "toy", "prompt": "x", **fields}).encode()


MALFORMED = {
    "not JSON": (CHAT, b"hello"),
    "a lonely byte": (CHAT, b"\xff"),
    "two objects": (CHAT, b"{}{}"),
    "nested too deep": (CHAT, b"[" * 100_000),
    "deep objects": (TEXT, b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "a huge number": (TEXT, b'{"model": "toy", "prompt": "x", "seed": ' + b"9" * 5000 + b"}"),
    "no model": (CHAT, json.dumps({"messages": [USER]}).encode()),
    "model a number": chat(model=5),
    "model null": chat(model=None),
    "messages a text": chat(messages="x"),
    "messages an object": chat(messages={"role": "user"}),
    "a message a list": chat(messages=[[]]),
    "a message without content": chat(messages=[{"role": "user"}]),
    "a part without text": chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
    "a part that is a text": chat(messages=[{"role": "user", "content": ["x"]}]),
    "audio": chat(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
    "temperature a text": chat(temperature="hot"),
    "temperature a list": chat(temperature=[1]),
    "temperature below 0": chat(temperature=-0.1),
    "stream a text": chat(stream="yes"),
    "stream options a list": chat(stream=True, stream_options=[]),
    "n a text": chat(n="2"),
    "n a fraction": chat(n=1.5),
    "stop a number": chat(stop=5),
    "stop of numbers": chat(stop=[5]),
    "too many stops": chat(stop=[str(n) for n in range(17)]),
    "a bias list": chat(logit_bias=[1]),
    "logprobs a number": chat(logprobs=1),
    "tools a text": chat(tools="x"),
    "a prompt of objects": text(prompt=[{}]),
    "mixed prompts": text(prompt=["x", [5]]),
    "logprobs true": text(logprobs=True),
    "max_tokens a text": text(max_tokens="5"),
    "max_tokens huge": text(max_tokens=10**30),
    "repetition_penalty 0": text(repetition_penalty=0),
    "a suffix": text(suffix="y"),
}


def test_malformed_requests(toy):
    """Each is refused in OpenAI's form, and the server goes on."""
    assert len(MALFORMED) >= 30
    before = len(toy.batch.admitted)
    for name, (path, body) in MALFORMED.items():
        for streamed in (False, True):
            data = body.replace(b'{"model": "toy"', b'{"stream": true, "model": "toy"') if streamed else body
            reply = toy.post(path, data)
            assert reply.status_code == 400, (name, reply.status_code, reply.text)
            assert error_of(reply)["type"] == "invalid_request_error", name
    assert len(toy.batch.admitted) == before
    assert toy.complete("x", max_tokens=2)["choices"]


def test_every_reply_has_an_id(toy):
    reply = toy.post(TEXT, {"model": "toy", "prompt": "x", "max_tokens": 1})
    assert reply.headers["x-request-id"] == reply.json()["id"]
