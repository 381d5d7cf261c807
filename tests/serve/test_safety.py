"""shared case 36, and what a browser may do: keys and origins."""

import logging

import openai
import pytest

from tests.support.server import HTTP, also, error_of

BODY = {"model": "toy", "prompt": "x", "max_tokens": 1}
HERE = "https://chat.example.org"


@pytest.fixture(scope="module")
def locked(toy_server):
    """The toy behind keys, for the pages of one origin."""
    with also(toy_server, keys=(b"secret-one", "schlüssel".encode()), origins=(HERE,)) as server:
        yield server


def bearer(key):
    return {"Authorization": b"Bearer " + key}


def test_36_keys(locked, caplog):
    with caplog.at_level(logging.INFO, "frspec_jax.serve.requests"):
        wrong = (b"secret-on", b"secret-one2", b"\xff\xfe\x80", b"schlussel")
        for headers in (
            {},
            {"Authorization": "Bearer"},
            *map(bearer, wrong),
            {"Authorization": "secret-one"},
            {"Authorization": "Basic secret-one"},
        ):
            error = locked.refused("/v1/completions", BODY, 401, headers=headers)
            assert error["code"] == "invalid_api_key" and error["type"] == "authentication_error"
            assert locked.get("/v1/models", headers=headers).status_code == 401
        for key in (b"secret-one", "schlüssel".encode()):
            assert locked.post("/v1/completions", BODY, headers=bearer(key)).status_code == 200
    assert len(caplog.records) > 10
    assert all("secret" not in str(record.__dict__) for record in caplog.records)
    with pytest.raises(openai.AuthenticationError):
        locked.client(api_key="wrong").completions.create(**BODY)
    assert locked.client(api_key="secret-one").completions.create(**BODY).choices
    for path in ("/health", "/ready", "/metrics", "/"):
        assert locked.get(path).status_code == 200


def test_36_a_browser_of_an_allowed_origin(locked, toy_server):
    asks = {"Origin": HERE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    reply = HTTP.options(f"{locked.url}/v1/chat/completions", headers=asks)
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == HERE
    assert "authorization" in reply.headers["access-control-allow-headers"].lower()
    reply = locked.post("/v1/completions", BODY, headers={"Origin": HERE})
    assert reply.status_code == 401 and reply.headers["access-control-allow-origin"] == HERE
    other = {**asks, "Origin": "https://elsewhere.example.org"}
    reply = HTTP.options(f"{locked.url}/v1/chat/completions", headers=other)
    assert "access-control-allow-origin" not in reply.headers
    # Off unless asked for.
    reply = HTTP.options(f"{toy_server.url}/v1/chat/completions", headers=asks)
    assert reply.status_code == 405 and error_of(reply) and "access-control-allow-origin" not in reply.headers


def test_what_is_logged_of_a_request(toy, caplog):
    with caplog.at_level(logging.INFO, "frspec_jax.serve.requests"):
        toy.chat("a secret word", max_tokens=3, seed=1)
        toy.refused("/v1/completions", {**BODY, "temperature": 9})
        toy.get("/secret-address")
        toy.get("/health")
    whole, wrong, nothing = (record.fields for record in caplog.records)
    assert (whole["status"], whole["completion_tokens"], whole["finish"]) == (200, 3, "length")
    assert whole["prompt_tokens"] > 0 and whole["path"] == "/v1/chat/completions" and whole["id"]
    assert whole["first_token_seconds"] <= whole["seconds"] and not whole["stream"]
    assert wrong["status"] == 400 and nothing["status"] == 404
    assert all("secret" not in str(record.__dict__) for record in caplog.records)


def test_the_page_may_do_nothing_but_its_own(toy_server):
    reply = toy_server.get("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
