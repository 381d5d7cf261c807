"""shared cases 1 to 4: what a stream holds, and how it ends."""

import threading

import openai
import pytest

from tests.support.server import HTTP, deltas, error_of, events_of

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "seed": 1}
LINES = "    🙂 你好 世界\n        café 👩‍💻\n" * 6 + "    🙂"


def test_1_a_stream_as_raw_bytes(toy):
    body = {"model": "toy", "stream": True, **CHAT}
    with HTTP.stream("POST", f"{toy.url}/v1/chat/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["cache-control"] == "no-cache" and reply.headers["x-accel-buffering"] == "no"
        events = events_of(b"".join(reply.iter_raw()).decode())
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
    assert events[0]["object"] == "chat.completion.chunk" and events[0]["model"] == "toy"
    choices = [event["choices"][0] for event in events]
    assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert choices[-1]["delta"] == {} and all("usage" not in event for event in events)


@pytest.mark.material
@pytest.mark.as_shipped
def test_2_characters_over_many_tokens(smol):
    whole = smol.complete(LINES, max_tokens=40)["choices"][0]["text"]
    assert "🙂" in whole and "你好" in whole and "\n        café" in whole
    assert "\ufffd" not in whole[:-1], "only the limit may cut a character"
    events = smol.events("/v1/completions", prompt=LINES, max_tokens=40, temperature=0)
    assert deltas(events) == whole
    assert all("\ufffd" not in event["choices"][0]["text"] for event in events[:-2])


def test_3_usage_in_a_stream(toy):
    events = toy.events("/v1/chat/completions", **CHAT, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    used = events[-1]["usage"]
    assert used["completion_tokens"] == 12 and used["total_tokens"] == used["prompt_tokens"] + 12
    assert used == toy.chat("hello", max_tokens=12, seed=1)["usage"]
    for options in ({}, None):
        assert all("usage" not in e for e in toy.events("/v1/chat/completions", **CHAT, stream_options=options))
    body = {"model": "toy", **CHAT, "stream_options": {"include_usage": True}}
    assert toy.refused("/v1/chat/completions", body)["param"] == "stream_options"


def test_4_a_fault_in_one_slot(toy, monkeypatch):
    alone = [toy.complete(f"prompt {n}", max_tokens=200, temperature=1, seed=n)["choices"][0]["text"] for n in range(3)]
    batch = toy.batch.batch
    told = batch._fresh
    for early in (True, False):

        def fails_of_the_victim(text, report, row, early=early):
            if text.request.seed == 999 and (early or len(text.tokens) > 30):
                raise ValueError("injected")
            return told(text, report, row)

        monkeypatch.setattr(batch, "_fresh", fails_of_the_victim)
        texts: dict[int, str] = {}

        def ask(n, texts=texts):
            texts[n] = toy.complete(f"prompt {n}", max_tokens=200, temperature=1, seed=n)["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        body = {"model": "toy", "prompt": "victim", "max_tokens": 300, "seed": 999, "stream": True}
        reply = toy.post("/v1/completions", body)
        if early:
            assert reply.status_code == 500 and error_of(reply)["type"] == "server_error"
        else:
            assert reply.status_code == 200
            parts = reply.text.split("\n\n")
            assert len(parts) > 2 and parts[-2].startswith('data: {"error":{') and "[DONE]" not in reply.text
        for thread in threads:
            thread.join(30)
        assert [texts.get(n) for n in range(3)] == alone
        if not early:
            with pytest.raises(openai.APIError):
                list(toy.client().completions.create(**body))
        monkeypatch.undo()
        toy.idle()
