"""shared cases 38 to 40: loading, dying, draining, and what the figures say of it."""

import asyncio
import concurrent.futures
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest

from frspec_jax.serve import life
from frspec_jax.serve.served import Settings
from tests.serve.conftest import TREE
from tests.support.server import HTTP, error_of, serving

ROOT = Path(__file__).parents[2]
BODY = {"model": "toy", "prompt": "x", "max_tokens": 400, "seed": 1, "logit_bias": {"2": -100}}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Process:
    """`python -m frspec_jax.serve` over the toy, as a user starts it."""

    def __init__(self, checkpoint, *flags):
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "frspec_jax.serve", "--ckpt", str(checkpoint.path), *flags]
        command += ["--name", "toy", "--port", self.url.rpartition(":")[2], "--dtype", "float32", "--context", "1024"]
        command += ["--tree-size", "4", "--depth", "2", "--draft-top-k", "2"]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.seen: list[tuple[int, int, int]] = []  # /health, /ready and a chat, while it loaded

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """A failed test leaves no server behind."""
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    def wait(self):
        """Until it is ready; what it says before."""
        end = time.monotonic() + 300
        while time.monotonic() < end:
            try:
                ready = HTTP.get(f"{self.url}/ready")
            except httpx2.TransportError:
                assert self.process.poll() is None, self.process.stderr.read()
                time.sleep(0.05)
                continue
            if ready.status_code == 200:
                return self
            # Of what is compiled before it is ready: others would wait for the compiler.
            chat = HTTP.post(f"{self.url}/v1/completions", json={"model": "toy", "prompt": "x", "max_tokens": 2})
            self.seen.append((HTTP.get(f"{self.url}/health").status_code, ready.status_code, chat.status_code))
            assert ready.json()["progress"]
            time.sleep(0.05)
        raise AssertionError("it never was ready")

    def ended(self, seconds=120) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said


@pytest.mark.sweep
def test_38_and_39_a_process_from_start_to_end(toy_folder):
    with Process(toy_folder, "--slots", "4", "--queue", "8", "--compare", "off") as server:
        server.wait()
        assert server.seen and set(server.seen) <= {(200, 503, 503), (200, 503, 200)} and server.seen[0][2] == 503
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            bodies = [{**BODY, "seed": n, "max_tokens": 400} for n in range(7)]
            asked = [
                pool.submit(httpx2.post, f"{server.url}/v1/completions", json=body, timeout=300) for body in bodies
            ]
            running = re.compile(r"frspec_requests_(?:running|waiting) (\d+)")
            while sum(map(int, running.findall(HTTP.get(f"{server.url}/metrics").text))) < 7:
                time.sleep(0.005)
            server.process.send_signal(signal.SIGTERM)
            while (refused := HTTP.post(f"{server.url}/v1/completions", json=BODY)).status_code == 200:
                time.sleep(0.005)
            assert refused.status_code == 503 and error_of(refused)["code"] == "not_ready"
            assert HTTP.get(f"{server.url}/ready").status_code == 503
            assert HTTP.get(f"{server.url}/health").status_code == 200
            for reply in (one.result() for one in asked):
                assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 400
        status, said = server.ended()
        assert status == 0 and '"message": "ended"' in said and "Traceback" not in said


@pytest.mark.sweep
def test_39_a_second_signal_ends_it_at_once(toy_folder):
    with Process(toy_folder, "--compare", "off") as server:
        server.wait()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(
                httpx2.post, f"{server.url}/v1/completions", json={**BODY, "n": 8, "max_tokens": 900}, timeout=60
            )
            time.sleep(0.2)
            for _ in range(2):
                server.process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
            status, said = server.ended(5)
            assert status == 143 and "Traceback" not in said
            with pytest.raises(httpx2.TransportError):
                asked.result()


@pytest.fixture
def own(toy_folder):
    """A server that a test may ruin."""
    with serving(
        toy_folder, Settings(names=("toy",), slots=4, queue=8), draft=TREE, context=512, dtype="float32"
    ) as server:
        yield server


def test_38_the_engine_dies(own):
    def dying(batch):
        if own.served.engine.running >= 3:
            raise RuntimeError("the device is gone")

    own.batch.before_step = dying
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(own.post, "/v1/completions", BODY) for _ in range(6)]
        replies = [one.result(120) for one in asked]
    assert all(reply.status_code == 503 for reply in replies)
    health = own.get("/health")
    assert health.status_code == 503 and own.get("/ready").status_code == 503
    assert own.refused("/v1/completions", BODY, 503)["code"] == "engine_dead"
    assert own.get("/metrics").status_code == 200


def test_38_the_engine_hangs(own):
    own.served.engine.stall = 0.3
    go = threading.Event()
    own.batch.before_step = lambda batch: go.wait(20)
    stream = {**BODY, "stream": True}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(own.post, "/v1/completions", body) for body in (BODY, stream)]
        assert [one.result(10).status_code for one in asked] == [503, 503]
    assert own.get("/health").status_code == 503
    go.set()


def test_39_the_time_to_drain_is_over(own):
    own.batch.before_step = lambda batch: time.sleep(0.05)

    class Told:
        should_exit = False

    ended = []

    def stream():
        with pytest.raises(openai.APIError) as error:
            list(own.client().completions.create(**BODY, stream=True))
        ended.append(str(error.value))

    threads = [threading.Thread(target=stream) for _ in range(6)]
    for thread in threads:
        thread.start()
    while own.served.left < 6:
        time.sleep(0.01)
    server = Told()
    asyncio.run(life.drain(own.served, server, 0.3))
    for thread in threads:
        thread.join(10)
    assert server.should_exit and len(ended) == 6 and all("shutting down" in text for text in ended)


def figures_of(server) -> dict[str, float]:
    lines = [line for line in server.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_40_figures_after_fifty_requests(toy):
    before = figures_of(toy)
    delivered = 0

    def whole(n):
        return toy.complete(f"{n}", max_tokens=10, seed=n, temperature=1)["usage"]

    def broken_off(n):
        body = {"model": "toy", "prompt": "x", "max_tokens": 400, "seed": n, "stream": True}
        with HTTP.stream("POST", f"{toy.url}/v1/completions", json={**body, "logit_bias": {"2": -100}}) as reply:
            next(reply.iter_raw())

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        used = list(pool.map(whole, range(40)))
        list(pool.map(broken_off, range(10)))
    delivered = sum(one["completion_tokens"] for one in used)
    toy.idle()
    time.sleep(0.2)
    after = figures_of(toy)
    assert after["frspec_requests_running"] == after["frspec_requests_waiting"] == 0
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    tokens = sum(
        grown[f'frspec_completion_tokens_total{{origin="{kind}"}}']
        for kind in ("own", "drafted")
        if f'frspec_completion_tokens_total{{origin="{kind}"}}' in grown
    )
    assert delivered <= tokens + 40 and tokens < delivered + 10 * 400
    assert grown['frspec_answers_total{reason="disconnected"}'] == 10
    assert grown["frspec_time_to_first_token_seconds_count"] == 50
    assert grown["frspec_rounds_total"] > 0 and grown["frspec_round_tokens_total"] >= grown["frspec_rounds_total"]
    assert after['frspec_accepted_at_depth_total{depth="1"}'] >= after.get(
        'frspec_accepted_at_depth_total{depth="2"}', 0
    )
    hold = threading.Event()
    toy.batch.before_step = lambda batch: hold.wait(120)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(toy.complete, "x", max_tokens=3)
        while not toy.served.engine.running:
            time.sleep(0.01)
        assert figures_of(toy)["frspec_requests_running"] == 1 and not asked.done()
        hold.set()
        asked.result(60)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--port", "99999"], "--port 99999"),
        (["--slots", "0"], "--slots 0"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--cors", "chat.example.org"], "--cors chat.example.org"),
        (["--api-key-file", "/nowhere/keys"], "--api-key-file /nowhere/keys"),
        (["--name", " "], "--name"),
        (["--context", "99999"], "--context 99999"),
        (["--draft", "nobody"], "--draft nobody"),
    ],
)
def test_flags_that_cannot_be(toy_folder, capsys, flags, named):
    from frspec_jax.serve.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main(["--ckpt", str(toy_folder.path), *flags])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and said.startswith(f"error: {named}") and "\n" not in said


def test_an_address_that_is_taken(toy_folder, toy_server, capsys):
    from frspec_jax.serve.__main__ import main

    port = toy_server.url.rpartition(":")[2]
    with pytest.raises(SystemExit) as stopped:
        main(["--ckpt", str(toy_folder.path), "--port", port])
    assert stopped.value.code == 2 and f"--port {port}" in capsys.readouterr().err


def test_weights_that_are_damaged(toy_copy):
    for file in (toy_copy.path / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            os.truncate(file, 10)
    server = Process(toy_copy)
    status, said = server.ended(60)
    assert status == 2 and said.splitlines()[-1].startswith("error: ") and "convert it again" in said
