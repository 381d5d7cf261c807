"""A server in this process, on a port of its own, and what tests do to it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import uvicorn

from frspec_jax import api
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.generator import Generator
from frspec_jax.serve import served as served_module
from frspec_jax.serve.app import application
from frspec_jax.serve.life import Server, bound
from frspec_jax.serve.served import Served, Settings

# Each call of httpx2.post would make a TLS context of its own, which takes longer than most of what is asked here.
HTTP = httpx2.Client(timeout=300, verify=False, limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0))


class Tampered:
    """A batch that a test can make fail, hang, or count: everything else is the batch's own."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self.before_step: Callable[[Any], None] | None = None
        self.admitted: list[Any] = []  # the requests' prompts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch, name)

    def admit(self, ids: Any, request: Any) -> int:
        self.admitted.append(ids)
        return self.batch.admit(ids, request)

    def step(self) -> Any:
        if self.before_step is not None:
            self.before_step(self.batch)
        return self.batch.step()


@dataclasses.dataclass
class Running:
    """A server that runs."""

    served: Served
    url: str
    name: str

    @property
    def model(self) -> Generator:
        assert self.served.model is not None
        return self.served.model

    @property
    def batch(self) -> Tampered:
        batch: Any = self.served.engine.batches[0]
        return batch

    def client(self, **how: Any) -> openai.OpenAI:
        usual = {"api_key": "none", "max_retries": 0, "timeout": 60, "http_client": HTTP}
        return openai.OpenAI(base_url=f"{self.url}/v1", **{**usual, **how})

    def post(self, path: str, body: Any, **how: Any) -> httpx2.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return HTTP.post(f"{self.url}{path}", content=data, **how)

    def get(self, path: str, **how: Any) -> httpx2.Response:
        return HTTP.get(f"{self.url}{path}", **how)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """A completion's whole reply."""
        body = {"model": self.name, "prompt": prompt, "temperature": 0, **fields}
        return self._whole("/v1/completions", body)

    def chat(self, said: Any, **fields: Any) -> dict[str, Any]:
        """A chat's whole reply, to messages or to what the user says."""
        messages = said if isinstance(said, list) else [{"role": "user", "content": said}]
        return self._whole("/v1/chat/completions", {"model": self.name, "messages": messages, **fields})

    def _whole(self, path: str, body: Any) -> dict[str, Any]:
        reply = self.post(path, body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def refused(self, path: str, body: Any, status: int = 400, **how: Any) -> dict[str, Any]:
        """The error of a request that must be refused, in OpenAI's form."""
        reply = self.post(path, body, **how)
        assert reply.status_code == status, (reply.status_code, reply.text)
        return error_of(reply)

    def events(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream, which must end with [DONE]."""
        reply = self.post(path, {"model": self.name, "stream": True, **fields})
        assert reply.status_code == 200, reply.text
        return events_of(reply.text)

    def idle(self, seconds: float = 20) -> None:
        """Wait until no request runs or waits."""
        end = time.monotonic() + seconds
        while self.served.left:
            assert time.monotonic() < end, f"{self.served.left} requests are still there"
            time.sleep(0.01)
        while self.batch.free != self.batch.slots:
            assert time.monotonic() < end, "a slot is not free"
            time.sleep(0.01)


def error_of(reply: httpx2.Response) -> dict[str, Any]:
    """What an error reply says; its form is checked, and that it gives nothing away."""
    body = reply.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert reply.headers["content-type"].startswith("application/json")
    for leak in ("Traceback", "/frspec_jax", "site-packages", "<html", "detail"):
        assert leak not in reply.text
    return body["error"]


def events_of(text: str) -> list[dict[str, Any]]:
    parts = text.split("\n\n")
    assert parts[-1] == "" and parts[-2] == "data: [DONE]", parts[-3:]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part[6:]) for part in parts[:-2]]


def deltas(events: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one choice of a stream."""
    out = []
    for event in events:
        for choice in event["choices"]:
            if choice["index"] == index:
                out.append(choice["text"] if "text" in choice else choice["delta"].get("content", ""))
    return "".join(out)


@contextlib.contextmanager
def running(served: Served) -> Iterator[Running]:
    """Answer over what is served, from a thread with an event loop of its own."""
    listener = bound("127.0.0.1", 0)
    config = uvicorn.Config(
        application(served), log_config=None, lifespan="off", timeout_graceful_shutdown=1, access_log=False
    )
    server = Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Running(served, f"http://127.0.0.1:{listener.getsockname()[1]}", served.settings.names[0])
    finally:
        # As when a process ends: whatever connection is open breaks.
        for connection in list(server.server_state.connections):
            with contextlib.suppress(RuntimeError, AttributeError):
                connection.loop.call_soon_threadsafe(connection.transport.abort)
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def serving(checkpoint: Checkpoint, settings: Settings, **load: Any) -> Iterator[Running]:
    """A server over a checkpoint, ready, with a batch that can be tampered with."""
    build = served_module._batch
    served_module._batch = lambda model, slots: Tampered(build(model, slots))
    served = Served(checkpoint, lambda mesh: api.load(checkpoint, mesh=mesh, **load), settings)
    served.engine.start()
    try:
        while served.engine.state == "loading":
            time.sleep(0.01)
        assert served.engine.error is None, served.engine.error
        with running(served) as server:
            yield server
    finally:
        served_module._batch = build
        served.close()


@contextlib.contextmanager
def also(server: Running, **settings: Any) -> Iterator[Running]:
    """The same engine behind other settings, at another port."""
    served = copy.copy(server.served)
    served.settings = dataclasses.replace(served.settings, **settings)
    with running(served) as other:
        yield other
