"""A server from its start to its end: it listens at once, loads, serves, drains at SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from jax.sharding import Mesh

from frspec_jax import api
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.errors import UserError
from frspec_jax.flags import DraftFlags
from frspec_jax.serve.app import application
from frspec_jax.serve.guard import JsonLines
from frspec_jax.serve.served import Served, Settings
from frspec_jax.sharding import meshes_of
from pallas_kernels.dispatch import Kernels

log = logging.getLogger(__name__)
FLUSH = 2.0  # seconds for errors to reach those who still wait at the end


def serve(args: argparse.Namespace, flags: DraftFlags, keys: tuple[bytes, ...]) -> None:
    """Serve until a signal says to end.

    Raises:
      UserError: the checkpoint cannot be served, or the address not be bound.
      Exception: what loading or compiling failed of otherwise.
    """
    checkpoint = Checkpoint.open(args.ckpt)
    draft = flags.resolved(checkpoint, args.dtype)
    api.draft_folder(checkpoint, draft)
    kernels = Kernels.all(args.kernels)
    api.runtime_of(checkpoint.config, args.dtype, args.context, args.chunk, kernels)  # refused before all else

    def load(mesh: Mesh | None) -> api.Generator:
        return api.load(
            checkpoint,
            draft,
            dtype=args.dtype,
            context=args.context,
            chunk=args.chunk,
            kernels=kernels,
            mesh=mesh,
        )

    meshes = meshes_of(args.data_parallel, args.tensor_parallel)
    settings = Settings(
        names=tuple(dict.fromkeys(args.name or [checkpoint.path.resolve().name])),
        slots=args.slots,
        queue=args.queue,
        seconds=args.seconds,
        body_bytes=args.body_kb * 1024,
        choices=args.choices,
        keys=keys,
        origins=tuple(args.cors or ()),
        control_tokens=args.control_tokens == "control",
        compare=args.compare == "on",
    )
    with written_log():
        served = Served(checkpoint, load, settings, meshes)
        listener = bound(args.host, args.port)
        asyncio.run(live(served, listener, args.drain_seconds))
    if served.engine.slots == 0 and served.engine.error is not None:  # nothing was ever served
        raise served.engine.error


@contextlib.contextmanager
def written_log() -> Iterator[None]:
    """One line of JSON a record, to standard error, as long as the server lives."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    loggers = {logging.getLogger("frspec_jax"): logging.INFO, logging.getLogger("uvicorn.error"): logging.WARNING}
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for logger, level in loggers.items():
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, handlers, propagate, level in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise UserError(f"--host {host} --port {port} cannot be listened on: {error.strerror}; name others") from None
    return listener


class Server(uvicorn.Server):
    """uvicorn's, but signals are ours: its own end refuses connections where clients are to get a 503."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def live(served: Served, listener: socket.socket, drain_seconds: float) -> None:
    """Serve from a socket until a signal, or until loading fails."""
    config = uvicorn.Config(
        application(served),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(FLUSH),
        lifespan="off",
    )
    server = Server(config)
    loop, ending = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    def on_signal() -> None:
        if ending:
            log.warning("a second signal: ending at once")
            logging.shutdown()
            os._exit(128 + signal.SIGTERM)
        ending.add(loop.create_task(drain(served, server, drain_seconds)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    host, port = listener.getsockname()[:2]
    address = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
    log.info("listening", extra={"fields": {"address": address, "models": served.settings.names}})
    served.engine.start()
    loading = loop.create_task(until_loaded(served, server))
    try:
        await server.serve(sockets=[listener])
    finally:
        loading.cancel()
        await asyncio.to_thread(served.close)
    log.info("ended")


async def until_loaded(served: Served, server: uvicorn.Server) -> None:
    """End the server where its model cannot be loaded."""
    begun = time.monotonic()
    try:
        await served.engine.ready()
    except Exception:
        server.should_exit = True
        return
    if served.engine.state == "ready":
        model: Any = served.model
        facts = {"seconds": round(time.monotonic() - begun, 1), "method": model.drafting.method.name}
        log.info("ready", extra={"fields": facts | {"context": model.runtime.context, "slots": served.engine.slots}})


async def drain(served: Served, server: uvicorn.Server, seconds: float) -> None:
    """Refuse new requests, let those that were taken end, and then stop listening."""
    log.info("draining", extra={"fields": {"left": served.left, "seconds": seconds}})
    served.drain()
    end = time.monotonic() + seconds
    while served.left and time.monotonic() < end:
        await asyncio.sleep(0.05)
    if served.left:
        log.warning("time is over for those that still run", extra={"fields": {"left": served.left}})
    await asyncio.to_thread(served.close)
    server.should_exit = True
