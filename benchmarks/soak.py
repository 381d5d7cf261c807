"""A server for 2,000 requests, of clients that leave, reset and read slowly; then a kill, a restart and a drain.

    PYTHONPATH=. python benchmarks/soak.py --ckpt checkpoints/smollm2 --json benchmarks/cpu2-soak.json

Nothing may be lost or mixed up, every slot is free at the end, and memory does not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import psutil
from rich.progress import Progress

from eval.commands.flags import progress_bar
from eval.runs.output import file_of
from eval.runs.provenance import save
from frspec_jax.errors import UserError, reported

KINDS = {"whole": 50, "stream": 25, "slow": 8, "leave": 8, "reset": 5, "silent": 4}  # of a hundred clients


def port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """`python -m frspec_jax.serve` in a process of its own."""

    def __init__(self, flags: list[str]) -> None:
        self.port, begun = port(), time.perf_counter()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "frspec_jax.serve", "--port", str(self.port), *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.memory = psutil.Process(self.process.pid)
        while not self._ready():
            if self.process.poll() is not None:
                raise UserError(f"the server ended with status {self.process.returncode}; start it by hand to see why")
            time.sleep(0.1)
        self.seconds_to_ready = round(time.perf_counter() - begun, 1)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()

    def _ready(self) -> bool:
        with contextlib.suppress(httpx2.TransportError):
            return httpx2.get(f"{self.url}/ready").status_code == 200
        return False

    @property
    def resident(self) -> float:
        """MB."""
        return round(self.memory.memory_info().rss / 2**20, 1)

    def gauge(self, name: str) -> float:
        lines = httpx2.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def body_of(n: int, model: str) -> dict[str, Any]:
    """Request n: its own sentence, limit, seed and temperature."""
    rng = random.Random(n)
    said = f"Repeat this sentence: The secret word of request {n} is PLUM-{n}."
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": said}], "seed": n}
    return body | {"max_tokens": rng.randint(4, 24), "temperature": rng.choice([0, 0, 0.8])}


async def client(n: int, kind: str, server: Server, http: httpx2.AsyncClient, model: str) -> tuple[str, str | None]:
    """One client: how it ended, and the text that it has, if it stayed for all of it."""
    body = body_of(n, model)
    if kind in ("leave", "reset", "silent"):
        await rude(body, kind, server)
        return "left", None
    for _ in range(1000):
        try:
            if kind == "whole":
                reply = await http.post("/v1/chat/completions", json=body)
                status, text = reply.status_code, ""
                if status == 200:
                    text = reply.json()["choices"][0]["message"]["content"]
            else:
                status, text = await streamed(http, body, slow=kind == "slow")
        except httpx2.HTTPError as error:
            return type(error).__name__, None
        if status != 429:
            return ("answered", text) if status == 200 else (f"status {status}", None)
        await asyncio.sleep(0.2)
    return "no room", None


async def streamed(http: httpx2.AsyncClient, body: dict[str, Any], slow: bool) -> tuple[int, str]:
    async with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
        text, done = "", False
        async for line in reply.aiter_lines():
            if slow:
                await asyncio.sleep(0.05)
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                choices = json.loads(line[6:]).get("choices") or [{"delta": {}}]
                text += choices[0]["delta"].get("content", "")
        return (reply.status_code if done or reply.status_code != 200 else 599), text


async def rude(body: dict[str, Any], kind: str, server: Server) -> None:
    """Leave in the middle of a stream, reset the connection there, or go before anything has come."""
    data = json.dumps(body | {"stream": True, "max_tokens": 200}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head + data)
    await writer.drain()
    if kind != "silent":
        await reader.read(400)
    if kind == "reset":  # a close that does not wait sends RST
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def soak(server: Server, model: str, count: int, connections: int, progress: Progress) -> dict[str, Any]:
    rng = random.Random(0)
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=count)
    ends: Counter[str] = Counter()
    texts: dict[int, str] = {}
    memory: list[tuple[int, float]] = []
    todo = iter(range(count))
    task = progress.add_task("requests", total=count)
    async with httpx2.AsyncClient(base_url=server.url, timeout=600) as http:

        async def worker() -> None:
            for n in todo:
                end, text = await client(n, kinds[n], server, http, model)
                ends[end] += 1
                if text is not None:
                    texts[n] = text
                if n % max(1, count // 20) == 0:
                    memory.append((n, server.resident))
                progress.advance(task)

        begun = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(connections)))
        seconds = time.perf_counter() - begun
        stays = [n for n, kind in enumerate(kinds) if kind in ("whole", "stream", "slow")]
        lost = [n for n in stays if n not in texts]
        # A text that names another request's word, or is not what the same request gives alone.
        mixed = [n for n, text in texts.items() if any(f"PLUM-{m}" in text for m in (n - 1, n + 1))]
        sample = rng.sample(sorted(texts), min(len(texts), max(20, count // 20)))
        alone = [await client(n, "whole", server, http, model) for n in sample]
        differ = [n for n, (_, text) in zip(sample, alone, strict=True) if text != texts[n]]
    for _ in range(200):
        if server.gauge("frspec_requests_running") == server.gauge("frspec_requests_waiting") == 0:
            break
        await asyncio.sleep(0.05)
    settled = [used for n, used in memory if n >= count // 10] or [server.resident]
    return {
        "requests": count,
        "connections": connections,
        "clients": dict(Counter(kinds)),
        "ends": dict(ends),
        "seconds": round(seconds, 1),
        "lost": len(lost),
        "mixed": len(mixed),
        "asked_again_alone": len(sample),
        "other_than_alone": len(differ),
        "running_at_the_end": server.gauge("frspec_requests_running"),
        "waiting_at_the_end": server.gauge("frspec_requests_waiting"),
        "resident_mb": {"at_a_tenth": settled[0], "most_after": max(settled), "at_the_end": server.resident},
        "resident_mb_by_request": memory,
    }


def drained(server: Server, model: str) -> dict[str, Any]:
    """SIGTERM in the middle of a stream: it ends whole, others get 503, and the status is 0."""
    body = body_of(1, model) | {"stream": True, "max_tokens": 100}
    with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        refused = httpx2.post(f"{server.url}/v1/chat/completions", json=body_of(2, model)).status_code
        whole = "data: [DONE]" in list(lines)
    return {"stream_whole": whole, "a_new_request": refused, "status": server.process.wait(60)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--requests", type=int, default=2000, metavar="N")
    parser.add_argument("--connections", type=int, default=32, metavar="N")
    parser.add_argument("--slots", type=int, default=8, metavar="N")
    parser.add_argument("--json", type=file_of("--json"), metavar="FILE")
    args, rest = parser.parse_known_args()
    with reported():
        name = Path(args.ckpt).resolve().name
        flags = ["--ckpt", args.ckpt, "--name", name, "--slots", str(args.slots), "--context", "512", *rest]
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(Server([*flags, "--dtype", "float32"]))
            figures: dict[str, Any] = {"model": name, "slots": args.slots, "seconds_to_ready": server.seconds_to_ready}
            with progress_bar() as progress:
                figures |= asyncio.run(soak(server, name, args.requests, args.connections, progress))
            print(json.dumps({k: v for k, v in figures.items() if k != "resident_mb_by_request"}, indent=2), flush=True)
            save(args.json, figures)
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
            again = stack.enter_context(Server([*flags, "--dtype", "float32"]))
            after = {"seconds_to_ready_after_kill": again.seconds_to_ready, "drain": drained(again, name)}
            print(json.dumps(after, indent=2), flush=True)
            save(args.json, figures | after)


if __name__ == "__main__":
    main()
