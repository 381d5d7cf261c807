"""shared cases 30 to 35: many clients at once, some of which leave, and more than there is room for."""

import concurrent.futures
import itertools
import random
import socket
import threading
import time

import openai

from tests.promises.test_compiled_once import programs
from tests.support.server import HTTP, deltas, events_of


def request_of(n):
    rng = random.Random(n)
    body = {"prompt": f"the hint of request {n}", "max_tokens": rng.randint(1, 25), "seed": n}
    return {**body, "temperature": rng.choice([0, 0.7, 1.2]), "top_p": rng.choice([1, 0.9])}


def leave_early(server, body):
    """Read a little of a stream, and go."""
    with HTTP.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}) as reply:
        if reply.status_code == 200:
            next(reply.iter_raw(), None)


def patiently(server, body):
    """A request that waits its turn outside a full queue."""
    while (reply := server.post("/v1/completions", body)).status_code == 429:
        time.sleep(0.05)
    assert reply.status_code == 200, reply.text
    return reply


def test_30_two_hundred_requests_with_leavers(toy):
    bodies = [{"model": "toy", **request_of(n)} for n in range(200)]

    def ask(n):
        if n % 5 == 0:
            return leave_early(toy, {**bodies[n], "max_tokens": 300})
        if n % 2:
            return patiently(toy, bodies[n]).json()["choices"][0]["text"]
        return deltas(events_of(patiently(toy, {**bodies[n], "stream": True}).text))

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(200)))
    toy.idle()
    for n in range(1, 200, 7):
        if n % 5:
            assert (
                texts[n] == toy.complete(**{k: v for k, v in bodies[n].items() if k != "model"})["choices"][0]["text"]
            )
    assert all(text is not None for n, text in enumerate(texts) if n % 5)
    assert len(set(texts)) > 100


def test_31_a_long_prompt_holds_nobody_up(toy):
    brought: list[set[int]] = []
    step = toy.batch.step

    def noted():
        fresh = step()
        brought.append({one.slot for one in fresh if one.tokens})
        return fresh

    toy.batch.step = noted
    try:
        streams = [
            threading.Thread(
                target=toy.events,
                args=("/v1/completions",),
                kwargs={"prompt": f"{n}", "max_tokens": 120, "seed": n, "logit_bias": {"2": -100}},
            )
            for n in range(3)
        ]
        for stream in streams:
            stream.start()
        while toy.served.engine.running < 3:
            time.sleep(0.001)
        long = toy.complete([7] * 500, max_tokens=3)
        assert long["usage"]["completion_tokens"] == 3
        for stream in streams:
            stream.join()
    finally:
        del toy.batch.step
    for slot in range(4):
        heard = [n for n, slots in enumerate(brought) if slot in slots]
        gaps = [b - a for a, b in itertools.pairwise(heard)]
        # Between two rounds of a text stands one chunk of another's prompt, and never two: but where a slot was empty.
        assert len([gap for gap in gaps if gap > 2]) <= 1, (slot, gaps)


def test_32_nothing_is_compiled_once_it_is_ready(toy):
    toy.complete("x", max_tokens=3, temperature=0.5)
    toy.complete("x", max_tokens=3)
    with programs() as made:
        for n in range(20):
            fields = {"temperature": n / 10, "top_p": 1 - n / 40, "top_k": n, "min_p": n / 50, "seed": 2**40 + n}
            fields |= {"presence_penalty": n / 20, "frequency_penalty": -n / 20, "logit_bias": {str(n): 1.5}}
            fields |= {"stop": ["zz", "q" * (n + 1)][: n % 3], "logprobs": n % 6, "n": 1 + n % 2}
            toy.complete([3 + n] * (1 + 20 * n), max_tokens=1 + n, **fields)
    assert made == []


def hang_up(server, body):
    """A client that sends its request, and is gone before the reply."""
    import json

    data = json.dumps({"model": "toy", **body}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_33_clients_that_vanish(toy):
    engine, hold = toy.served.engine, threading.Event()
    toy.batch.before_step = lambda batch: engine.running == 4 and hold.wait(120)
    before = len(toy.batch.admitted)
    fill = [hang_up(toy, {"prompt": [5] * 400, "max_tokens": 50}) for _ in range(4)]
    while engine.running < 4:
        time.sleep(0.005)
    queued = [hang_up(toy, {"prompt": [6] * 9, "max_tokens": 50}) for _ in range(2)]
    stays: list[str] = []
    stayer = threading.Thread(target=lambda: stays.append(toy.complete("the", max_tokens=9)["choices"][0]["text"]))
    while engine.waiting < 2:
        time.sleep(0.005)
    stayer.start()
    while engine.waiting < 3:
        time.sleep(0.005)
    for connection in (*queued, *fill[:3]):
        connection.close()
    while engine.waiting > 1:
        time.sleep(0.005)
    time.sleep(0.1)
    hold.set()
    stayer.join(20)
    fill[3].close()
    toy.idle()
    assert [len(ids) for ids in toy.batch.admitted[before:]] == [400] * 4 + [len(toy.served.encoder.text("the"))]
    assert stays == [toy.complete("the", max_tokens=9)["choices"][0]["text"]]


def test_34_more_than_there_is_room_for(toy):
    hold = threading.Event()
    toy.batch.before_step = lambda batch: hold.wait(120)
    body = {"model": "toy", "prompt": "x", "max_tokens": 5, "seed": 1}
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        begun = time.monotonic()
        asked = [pool.submit(toy.post, "/v1/completions", body) for _ in range(50)]
        while sum(one.done() for one in asked) < 38:
            time.sleep(0.01)
            assert time.monotonic() - begun < 100
        refused = [one.result() for one in asked if one.done()]
        assert all(one.status_code == 429 and int(one.headers["retry-after"]) >= 1 for one in refused)
        try:
            toy.client(max_retries=1).completions.create(**body)
        except openai.RateLimitError as error:
            assert error.type == "rate_limit_error" and error.code == "rate_limit_exceeded"
        else:
            raise AssertionError("there was room")
        hold.set()
        replies = [one.result() for one in asked]
    assert sorted(one.status_code for one in replies) == [200] * 12 + [429] * 38
    assert toy.complete("x", max_tokens=2)["choices"]


def test_35_bodies_and_lists_that_are_too_large(toy):
    host, port = toy.url.removeprefix("http://").split(":")

    def sent(head: bytes, parts):
        """The reply to a body of which only as much is sent as the server takes."""
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
            count = 0
            try:
                for part in parts:
                    connection.sendall(part)
                    count += len(part)
            except OSError:
                pass  # it has closed: the reply may be there already
            try:
                return connection.recv(65536), count
            except OSError:
                return b"", count

    reply, _ = sent(b"Content-Length: 104857600", ())
    assert reply.startswith(b"HTTP/1.1 413") and b'"error"' in reply
    megabyte = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    reply, count = sent(b"Transfer-Encoding: chunked", (megabyte for _ in range(100)))
    assert count < 50 * 2**20 and (not reply or reply.startswith(b"HTTP/1.1 413"))
    reply, _ = sent(b"Transfer-Encoding: chunked", [megabyte])
    assert reply.startswith(b"HTTP/1.1 413") and b'"error"' in reply
    body = {"model": "toy", "prompt": "x"}
    assert toy.refused("/v1/completions", {**body, "n": 100_000})["param"] == "n"
    error = toy.refused("/v1/completions", {**body, "prompt": ["x"] * 10_000})
    assert error["param"] == "prompt" and "12" in error["message"]
