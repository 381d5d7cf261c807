"""Requests from many clients to one batch: an asyncio front, a bounded queue, and the one thread that drives the batch.

async with Engine.over(model, slots=8) as engine:
    async for piece in engine.stream(model.encode("Why is the sky blue?"), Request(stop=("END",))):
        print(piece.text, end="")

First come, first served. What reaches a client is made in its own event loop, while the thread is busy with the next
step. Nothing here knows how a batch decodes, or of HTTP.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from frspec_jax.errors import UserError
from frspec_jax.tickets import Ended, Overloaded, Piece, Ticket, Unready
from frspec_jax.writer import Writer

if TYPE_CHECKING:
    from frspec_jax.batch import Batch, Fresh
    from frspec_jax.generator import Generator
    from frspec_jax.request import Request

__all__ = ["Ended", "Engine", "Overloaded", "Piece", "Ticket", "Unready"]
log = logging.getLogger(__name__)
State = Literal["loading", "ready", "draining", "dead", "closed"]
Asked = tuple[np.ndarray, "Request"]
CLOSING = "the server is shutting down"
DEAD = "the engine has stopped; the server must be started again"
Say = Callable[[str], None]


class Engine:
    """The front of a batch; many clients, in any number of event loops, may use it at once."""

    def __init__(
        self,
        build: Callable[[Say], Batch],
        writer: Callable[[Request], Writer],
        *,
        queue: int = 64,
        stall: float = 120.0,
    ) -> None:
        """Nothing runs before `start`.

        Args:
          build: makes the batch and compiles what requests need, in the engine's thread; it is given a function that
            takes a word on how far it is.
          writer: makes what turns a request's tokens into text.
          queue: requests that may wait for a slot.
          stall: seconds that a step may take before the thread counts as hung.
        """
        self._build, self._writer, self._queue, self._stall = build, writer, queue, stall
        self._batch: Batch | None = None
        self._work = threading.Condition()  # over all below
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._admitting: Ticket | None = None  # on its way from the one to the other
        self._running: dict[int, Ticket] = {}  # by slot
        self._leaving: list[Ticket] = []
        self._state: State = "loading"
        self._working_since: float | None = None
        self._served = 5.0  # seconds in a slot, lately
        self.progress = "waiting to start"
        self.error: BaseException | None = None  # that the thread died of
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._watch = threading.Thread(target=self._watch_main, name="engine-watch", daemon=True)
        self._over = threading.Event()  # the thread has ended, or counts as dead

    @classmethod
    def over(cls, model: Generator, slots: int = 8, **limits: float) -> Engine:
        """One over a loaded model."""

        def build(say: Say) -> Batch:
            from frspec_jax.batch import Batch

            say("compiling")
            batch = Batch(model, slots)
            batch.warm_up()
            return batch

        checkpoint = model.checkpoint

        def writer(request: Request) -> Writer:
            return Writer(checkpoint.tokenizer, request.stop, checkpoint.stop_ids)

        return cls(build, writer, **limits)  # type: ignore[arg-type]

    # What clients use --------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to load; `state` says when requests are taken."""
        self._thread.start()
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
        while self._state == "loading":
            await asyncio.sleep(0.02)
        if self.error is not None:
            raise self.error

    @property
    def state(self) -> State:
        return self._state

    @property
    def slots(self) -> int:
        """Requests that may run at once; 0 while it loads."""
        return 0 if self._batch is None else self._batch.slots

    @property
    def most(self) -> int:
        """Requests that may run and wait at once."""
        return self.slots + self._queue

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running) + (self._admitting is not None)

    @property
    def retry_after(self) -> int:
        """Seconds after which a request that found the queue full may find room: a guess from what took how long."""
        return max(1, min(60, round(self._served * (1 + len(self._waiting)) / max(1, self.slots))))

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
        with self._work:
            self._takes_requests()
            if self.waiting + self.running + len(tickets) > self.most:
                raise Overloaded(
                    f"{self.running} requests run and {self.waiting} wait: there is no room for "
                    f"{len(tickets)} more; try again later"
                )
            self._waiting.extend(tickets)
            self._work.notify()
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
        with self._work:
            if self._state in ("loading", "ready"):
                self._state = "draining"

    def close(self, seconds: float = 10.0) -> None:
        """End the thread, within one step; whoever still waits gets an error."""
        self._end("closed", Unready(CLOSING))
        if self._thread.is_alive():
            self._thread.join(seconds)

    def leave(self, ticket: Ticket) -> None:
        """A client is gone, or has all that it wants: its slot is free after the step that runs."""
        with self._work:
            with contextlib.suppress(ValueError):
                self._waiting.remove(ticket)
                return
            self._leaving.append(ticket)
            self._work.notify()

    # The thread --------------------------------------------------------------------------------------

    def _takes_requests(self) -> Batch:
        if self._state != "ready" or self._batch is None:
            dead = self._state == "dead"
            reasons = {"loading": f"the model is loading ({self.progress})", "dead": DEAD}
            raise Unready(reasons.get(self._state, CLOSING), dead=dead)
        return self._batch

    def _say(self, progress: str) -> None:
        self.progress = progress
        log.info("%s", progress)

    def _main(self) -> None:
        try:
            batch = self._build(self._say)
            with self._work:
                self._batch = batch
                if self._state == "loading":
                    self._state = "ready"
            self._say("ready")
            while self._turn(batch):
                pass
        except BaseException as error:
            if not isinstance(error, UserError):
                log.exception("the engine's thread has died")
            self.error = error
            self._end("dead", Unready(DEAD, dead=True))

    def _turn(self, batch: Batch) -> bool:
        """Let go of who left, take in who waits, do one step and hand out what it brought; False: it is over."""
        with self._work:
            self._working_since = None
            self._work.wait_for(
                lambda: self._waiting or self._leaving or batch.busy or self._state in ("closed", "dead")
            )
            if self._state in ("closed", "dead"):
                return False
            self._working_since = time.monotonic()
            leaving, self._leaving = self._leaving, []
        for slot in [slot for slot, ticket in self._running.items() if ticket in leaving]:
            batch.cancel(slot)
            self._free(slot)
        while batch.free and (ticket := self._next()) is not None:
            try:
                slot = batch.admit(ticket.ids, ticket.request)
            except Exception as error:
                log.exception("a request could not be admitted")
                self._admitting = None
                _post([(ticket, error)])
                continue
            ticket.admitted = time.monotonic()
            with self._work:
                self._admitting = None
                if self._state not in ("closed", "dead"):
                    self._running[slot] = ticket
        if not batch.busy:
            return True
        self._hand_out(batch.step())
        return True

    def _next(self) -> Ticket | None:
        with self._work:
            self._admitting = self._waiting.popleft() if self._waiting else None
            return self._admitting

    def _free(self, slot: int) -> Ticket | None:
        with self._work:
            ticket = self._running.pop(slot, None)
        if ticket is not None and ticket.admitted is not None:
            self._served += 0.1 * (time.monotonic() - ticket.admitted - self._served)
        return ticket

    def _hand_out(self, brought: Iterable[Fresh]) -> None:
        events: list[tuple[Ticket, Fresh | Exception]] = []
        for fresh in brought:
            ticket = self._running.get(fresh.slot)
            if fresh.finish_reason is not None or fresh.fault is not None:
                self._free(fresh.slot)
            if ticket is not None:
                events.append((ticket, fresh.fault or fresh))
        for ticket in _post(events):  # whose event loop is gone
            self.leave(ticket)

    def _end(self, state: State, error: Exception) -> None:
        with self._work:
            if self._state in ("dead", "closed"):
                return
            self._state = state
            waiting = [*self._waiting, *self._running.values()]
            waiting += [] if self._admitting is None else [self._admitting]
            self._waiting.clear()
            self._running.clear()
            self._work.notify_all()
        self._over.set()
        _post([(ticket, error) for ticket in waiting])

    def _watch_main(self) -> None:
        """Nobody waits for a thread that hangs in a step: it counts as dead."""
        while not self._over.wait(min(1.0, self._stall / 4)):
            since = self._working_since
            if since is not None and time.monotonic() - since > self._stall:
                log.error("a step has taken more than %.0f s; the engine counts as dead", self._stall)
                self._end("dead", Unready("the engine hangs; the server must be started again", dead=True))


def _post(events: Sequence[tuple[Ticket, Fresh | Exception]]) -> list[Ticket]:
    """Wake each event loop once for all that came for its clients; gives back those whose loop is closed."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Fresh | Exception]]] = {}
    for ticket, event in events:
        by_loop.setdefault(ticket.loop, []).append((ticket, event))
    lost = []
    for loop, its in by_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver, its)
        except RuntimeError:
            lost += [ticket for ticket, _ in its]
    return lost


def _deliver(events: list[tuple[Ticket, Fresh | Exception]]) -> None:
    for ticket, event in events:
        ticket.take(event)
