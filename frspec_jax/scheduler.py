"""Requests from many clients to one batch or several: an asyncio front over a bounded queue.

async with Engine.over(model, slots=8) as engine:
    async for piece in engine.stream(model.encode("Why is the sky blue?"), Request(stop=("END",))):
        print(piece.text, end="")

First come, first served, by the batch that has the fewest requests. What reaches a client is made in its own event
loop, while the thread of its batch (`workers`) is busy with the next step. Nothing here knows how a batch decodes, or
of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from frspec_jax.tickets import Ended, Overloaded, Piece, Ticket, Unready
from frspec_jax.workers import DEAD, Build, Desk, Say, State
from frspec_jax.writer import Writer

if TYPE_CHECKING:
    from frspec_jax.batch import Batch
    from frspec_jax.generator import Generator
    from frspec_jax.request import Request

__all__ = ["Ended", "Engine", "Overloaded", "Piece", "Say", "Ticket", "Unready"]
Asked = tuple[np.ndarray, "Request"]
CLOSING = "the server is shutting down"


class Engine:
    """The front of a batch, or of several; many clients, in any number of event loops, may use it at once."""

    def __init__(
        self,
        builds: Sequence[Build],
        writer: Callable[[Request], Writer],
        *,
        queue: int = 64,
        stall: float = 120.0,
    ) -> None:
        """Nothing runs before `start`.

        Args:
          builds: each makes a batch and compiles what requests need, in the thread that then drives the batch; it is
            given a function that takes a word on how far it is.
          writer: makes what turns a request's tokens into text.
          queue: requests that may wait for a slot.
          stall: seconds that a step may take before a thread counts as hung.
        """
        self._desk, self._writer, self._queue, self.stall = Desk(builds), writer, queue, stall
        self._watch = threading.Thread(
            target=self._desk.watch, args=(lambda: self.stall,), name="engine-watch", daemon=True
        )

    @classmethod
    def over(cls, model: Generator | Sequence[Generator], slots: int = 8, **limits: float) -> Engine:
        """One over a loaded model, or over the same model on several devices (`sharding.meshes_of`).

        slots: of each.
        """
        models = [*model] if isinstance(model, Sequence) else [model]

        def build(model: Generator, say: Say) -> Batch:
            from frspec_jax.batch import Batch

            say("compiling")
            batch = Batch(model, slots)
            batch.warm_up()
            return batch

        checkpoint = models[0].checkpoint

        def writer(request: Request) -> Writer:
            return Writer(checkpoint.tokenizer, request.stop, checkpoint.stop_ids)

        return cls([functools.partial(build, one) for one in models], writer, **limits)  # type: ignore[arg-type]

    # What clients use --------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to load; `state` says when requests are taken."""
        for worker in self._desk.workers:
            worker.thread.start()
        self._watch.start()
        return self

    async def __aenter__(self) -> Self:
        """Started, and ready."""
        self.start()
        await self.ready()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    async def ready(self) -> None:
        """Wait until requests are taken.

        Raises:
          Exception: what loading failed of.
        """
        while self.state == "loading":
            await asyncio.sleep(0.02)
        if self.error is not None:
            raise self.error

    @property
    def state(self) -> State:
        return self._desk.state

    @property
    def progress(self) -> str:
        """How far loading is."""
        return self._desk.progress

    @property
    def error(self) -> BaseException | None:
        """What a thread died of."""
        return self._desk.error

    @property
    def batches(self) -> Sequence[Batch]:
        """What it is the front of; nothing while it loads."""
        return self._desk.batches

    @property
    def slots(self) -> int:
        """Requests that may run at once; 0 while it loads."""
        return sum(batch.slots for batch in self.batches)

    @property
    def most(self) -> int:
        """Requests that may run and wait at once."""
        return self.slots + self._queue

    @property
    def waiting(self) -> int:
        return len(self._desk.waiting)

    @property
    def running(self) -> int:
        return self._desk.running

    @property
    def retry_after(self) -> int:
        """Seconds after which a request that found the queue full may find room: a guess from what took how long."""
        return max(1, min(60, round(self._desk.served * (1 + self.waiting) / max(1, self.slots))))

    def room(self, ids: np.ndarray, request: Request) -> int:
        """Tokens that may be emitted after a prompt. Raises UserError: it does not fit; Unready: nothing runs."""
        return self._takes_requests().check(ids, request)

    def submit(self, asked: Sequence[Asked], *, seconds: float | None = None) -> list[Ticket]:
        """Queue requests, all or none; from within an event loop, in which their pieces will come.

        seconds: the time that they may take from now.

        Raises:
          Overloaded: the queue is full. Unready: the engine loads, drains or is dead. UserError: a prompt that does not
            fit.
        """
        batch = self._takes_requests()
        for ids, request in asked:
            batch.check(ids, request)
        tickets = [Ticket(self, ids, request, self._writer(request), seconds) for ids, request in asked]
        with self._desk.lock:
            self._takes_requests()
            if self.waiting + self.running + len(tickets) > self.most:
                raise Overloaded(
                    f"{self.running} requests run and {self.waiting} wait: there is no room for "
                    f"{len(tickets)} more; try again later"
                )
            self._desk.waiting.extend(tickets)
            self._desk.lock.notify_all()
        for ticket in tickets:
            ticket.arm()
        return tickets

    async def stream(
        self, prompt: np.ndarray | Sequence[int], request: Request, *, seconds: float | None = None
    ) -> AsyncIterator[Piece]:
        """The answer to a prompt of token ids [T], as it comes; leaving the iteration cancels the request."""
        (ticket,) = self.submit([(np.asarray(prompt, np.int32), request)], seconds=seconds)
        with contextlib.closing(ticket):
            async for piece in ticket:
                yield piece

    def drain(self) -> None:
        """Take no more requests; those that were taken go on."""
        with self._desk.lock:
            if self.state in ("loading", "ready"):
                self._desk.state = "draining"

    def close(self, seconds: float = 10.0) -> None:
        """End the threads, within one step; whoever still waits gets an error."""
        self._desk.end("closed", Unready(CLOSING))
        for worker in self._desk.workers:
            if worker.thread.is_alive():
                worker.thread.join(seconds)

    def leave(self, ticket: Ticket) -> None:
        """A client is gone, or has all that it wants: its slot is free after the step that runs."""
        self._desk.leave(ticket)

    def _takes_requests(self) -> Batch:
        """Some batch: what one takes, all take."""
        desk = self._desk
        if desk.state != "ready":
            reasons = {"loading": f"the model is loading ({desk.progress})", "dead": DEAD}
            raise Unready(reasons.get(desk.state, CLOSING), dead=desk.state == "dead")
        return desk.batches[0]
