"""The threads of an engine, each of which drives a batch, and what they share: who waits, who leaves, what goes on."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from frspec_jax.errors import UserError
from frspec_jax.tickets import Ticket, Unready

if TYPE_CHECKING:
    from frspec_jax.batch import Batch, Fresh

log = logging.getLogger(__name__)
State = Literal["loading", "ready", "draining", "dead", "closed"]
Say = Callable[[str], None]
Build = Callable[[Say], "Batch"]
DEAD = "the engine has stopped; the server must be started again"
OVER: tuple[State, State] = ("closed", "dead")


class Desk:
    """Where requests wait for a slot of one of several batches. Whatever may change is under one lock."""

    def __init__(self, builds: Sequence[Build]) -> None:
        self.lock = threading.Condition()  # over all below
        self.waiting: collections.deque[Ticket] = collections.deque()
        self.state: State = "loading"
        self.served = 5.0  # seconds in a slot, lately
        self.progress = "waiting to start"
        self.error: BaseException | None = None  # that a thread died of
        self.over = threading.Event()  # nothing runs any more, or it counts as dead
        self.building = threading.Lock()  # one batch after the other, since costs are measured while it is made
        self.workers = [Worker(self, build) for build in builds]

    @property
    def running(self) -> int:
        """Requests in a slot, or on their way to one."""
        return sum(worker.holds for worker in self.workers)

    @property
    def batches(self) -> list[Batch]:
        """All batches; none while one of them is not made yet."""
        made = [worker.batch for worker in self.workers if worker.batch is not None]
        return made if len(made) == len(self.workers) else []

    def say(self, progress: str) -> None:
        """Note how far loading is."""
        self.progress = progress
        log.info("%s", progress)

    def next_for(self, worker: Worker) -> Ticket | None:
        """Who has waited longest, on its way to this worker from now on; None where another has fewer requests."""
        with self.lock:
            if not self.waiting or worker.holds > min(other.holds for other in self.workers):
                return None
            worker.admitting = self.waiting.popleft()
            return worker.admitting

    def leave(self, ticket: Ticket) -> None:
        """A client is gone, or has all that it wants: its slot is free after the step that runs."""
        with self.lock:
            with contextlib.suppress(ValueError):
                self.waiting.remove(ticket)
                return
            for worker in self.workers:
                if worker.has(ticket):
                    worker.leaving.append(ticket)
            self.lock.notify_all()

    def end(self, state: State, error: Exception) -> None:
        """Let nothing more be done; whoever waits or runs gets the error."""
        with self.lock:
            if self.state in OVER:
                return
            self.state = state
            left = [*self.waiting]
            self.waiting.clear()
            for worker in self.workers:
                left += worker.given_up()
            self.lock.notify_all()
        self.over.set()
        post([(ticket, error) for ticket in left])

    def watch(self, stall: Callable[[], float]) -> None:
        """Until all is over. Nobody waits for a thread that hangs in a step for longer than `stall`: it is dead."""
        while not self.over.wait(min(1.0, stall() / 4)):
            now = time.monotonic()
            if any(w.working_since is not None and now - w.working_since > stall() for w in self.workers):
                log.error("a step has taken more than %.0f s; the engine counts as dead", stall())
                self.end("dead", Unready("the engine hangs; the server must be started again", dead=True))


class Worker:
    """A thread and its batch: in turns it lets go of who left, takes in who waits, and does a step."""

    def __init__(self, desk: Desk, build: Build) -> None:
        self.batch: Batch | None = None
        self.admitting: Ticket | None = None  # on its way from the queue to a slot
        self.leaving: list[Ticket] = []
        self.working_since: float | None = None
        self.thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._desk, self._build = desk, build
        self._running: dict[int, Ticket] = {}  # by slot

    @property
    def holds(self) -> int:
        """Requests that are its."""
        return len(self._running) + (self.admitting is not None)

    def has(self, ticket: Ticket) -> bool:
        """Whether a request is its."""
        return ticket is self.admitting or any(ticket is mine for mine in self._running.values())

    def given_up(self) -> list[Ticket]:
        """Its requests, which are nobody's after that."""
        left = [*self._running.values(), *([] if self.admitting is None else [self.admitting])]
        self._running.clear()
        return left

    def _main(self) -> None:
        desk = self._desk
        try:
            with desk.building:
                if desk.state in OVER:  # closed, or another batch could not be made
                    return
                batch = self._build(desk.say)
            with desk.lock:
                self.batch = batch
                ready = bool(desk.batches)
                if ready and desk.state == "loading":
                    desk.state = "ready"
            if ready:
                desk.say("ready")
            while self._turn(batch):
                pass
        except BaseException as error:
            if not isinstance(error, UserError):
                log.exception("the engine's thread has died")
            desk.error = error
            desk.end("dead", Unready(DEAD, dead=True))

    def _turn(self, batch: Batch) -> bool:
        """One turn, as soon as there is something to do; False: it is over."""
        desk = self._desk
        with desk.lock:
            self.working_since = None
            desk.lock.wait_for(lambda: desk.waiting or self.leaving or batch.busy or desk.state in OVER)
            if desk.state in OVER:
                return False
            self.working_since = time.monotonic()
            leaving, self.leaving = self.leaving, []
        for slot in [slot for slot, ticket in list(self._running.items()) if ticket in leaving]:
            batch.cancel(slot)
            self._free(slot)
        while batch.free and (ticket := desk.next_for(self)) is not None:
            try:
                slot = batch.admit(ticket.ids, ticket.request)
            except Exception as error:
                log.exception("a request could not be admitted")
                self.admitting = None
                post([(ticket, error)])
                continue
            ticket.admitted = time.monotonic()
            with desk.lock:
                self.admitting = None
                if desk.state not in OVER:
                    self._running[slot] = ticket
        if batch.busy:
            self._hand_out(batch.step())
        return True

    def _free(self, slot: int) -> None:
        with self._desk.lock:
            ticket = self._running.pop(slot, None)
            if ticket is not None and ticket.admitted is not None:
                self._desk.served += 0.1 * (time.monotonic() - ticket.admitted - self._desk.served)

    def _hand_out(self, brought: Iterable[Fresh]) -> None:
        events: list[tuple[Ticket, Fresh | Exception]] = []
        for fresh in brought:
            ticket = self._running.get(fresh.slot)
            if fresh.finish_reason is not None or fresh.fault is not None:
                self._free(fresh.slot)
            if ticket is not None:
                events.append((ticket, fresh.fault or fresh))
        for ticket in post(events):  # whose event loop is gone
            self._desk.leave(ticket)


def post(events: Sequence[tuple[Ticket, Fresh | Exception]]) -> list[Ticket]:
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
