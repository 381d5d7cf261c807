"""One request on its way through the engine: what its client waits on, in the client's own event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from frspec_jax.errors import UserError
from frspec_jax.writer import Said, Writer

if TYPE_CHECKING:
    from frspec_jax.batch import Fresh
    from frspec_jax.request import Request
    from frspec_jax.scheduler import Engine

log = logging.getLogger(__name__)


class Overloaded(Exception):
    """The queue is full; the sentence says how many run and wait."""


class Unready(Exception):
    """The engine takes no requests: it loads, drains, or is dead."""

    def __init__(self, reason: str, *, dead: bool = False) -> None:
        super().__init__(reason)
        self.dead = dead


class Ended(Exception):
    """A request that did not reach its end.

    kind: "fault" (something failed in it, and in it alone), "time" (it took more than it may), "engine" (no request
    goes on).
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Figures:
    """How an answer came about, so far."""

    prompt_tokens: int
    completion_tokens: int  # emitted, the one that ended it included; none after a stop text
    rounds: int  # the first token is the prefill's, and takes none
    histogram: tuple[int, ...]  # rounds that brought 1, 2, ... tokens
    queued: float  # seconds until it was given a slot
    first: float  # seconds from its arrival to its first token
    seconds: float  # seconds from its arrival until now
    decoding: float  # seconds since the first token

    @property
    def accepted_length(self) -> float | None:
        """Tokens a round, the bonus token counted."""
        return sum(n * count for n, count in enumerate(self.histogram, 1)) / self.rounds if self.rounds else None

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first, which the prompt's reading brings."""
        return (self.completion_tokens - 1) / self.decoding if self.decoding > 0 else None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A further part of an answer: whole characters, and nothing that may yet turn out to begin a stop text."""

    said: tuple[Said, ...]  # the tokens whose text this is
    taken: int  # tokens that came since the last piece
    finish_reason: str | None  # "stop" (a stop id or stop text) or "length" with the last piece
    figures: Figures

    @property
    def text(self) -> str:
        return "".join(said.text for said in self.said)


class Ticket:
    """An async iterator over the pieces of one answer. `close` when no more are wanted."""

    def __init__(
        self, engine: Engine, ids: np.ndarray, request: Request, writer: Writer, seconds: float | None
    ) -> None:
        self.ids, self.request, self.loop = ids, request, asyncio.get_running_loop()
        self.arrived = time.monotonic()
        self.admitted: float | None = None  # set by the engine's thread
        self._engine, self._writer, self._seconds = engine, writer, seconds
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._first: float | None = None
        self._histogram: list[int] = []
        self._shown = 0  # tokens that pieces have counted
        self._ended = False  # nothing more will come
        self._alarm: asyncio.TimerHandle | None = None

    def arm(self) -> None:
        """Let its time begin to run."""
        if self._seconds is not None and not self._ended:
            self._alarm = self.loop.call_later(self._seconds, self._expire)

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Piece:
        """The next piece. Raises Ended: the request failed, took too long, or the engine stopped."""
        if self._ended and self._pieces.empty():
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self) -> None:
        """The client is gone or has what it wants; a request that still runs is cancelled."""
        if not self._ended:
            self._finish()
            self._engine.leave(self)

    def take(self, event: Fresh | Exception) -> None:
        """What the engine has for it: tokens, or an error. Called in its event loop."""
        if self._ended:
            return
        if isinstance(event, Exception):
            self._fail(_ended_by(event))
            return
        try:
            self._take(event)
        except Exception as error:  # a fault in one text is that text's alone
            log.exception("a request has failed")
            self._fail(_ended_by(error))
            if event.finish_reason is None:
                self._engine.leave(self)

    def _take(self, fresh: Fresh) -> None:
        if self._first is None:
            self._first = time.monotonic()
        elif fresh.tokens:
            self._histogram += [0] * (len(fresh.tokens) - len(self._histogram))
            self._histogram[len(fresh.tokens) - 1] += 1
        likely: tuple[Any, ...] = fresh.logprobs or (None,) * len(fresh.tokens)
        said: list[Said] = []
        for token, origin, its in zip(fresh.tokens, fresh.origins, likely, strict=True):
            said += self._writer.push(token, origin, its)
            if self._writer.stopped:
                break
        reason = fresh.finish_reason
        if reason is not None:
            said += self._writer.finish()
        if self._writer.stopped:
            if reason is None:
                self._engine.leave(self)
            reason = "stop"
        if reason is not None:
            self._finish()
        if said or reason is not None:
            taken, self._shown = self._writer.taken - self._shown, self._writer.taken
            self._pieces.put_nowait(Piece(tuple(said), taken, reason, self.figures()))

    def figures(self) -> Figures:
        now = time.monotonic()
        first = self._first or now
        return Figures(
            prompt_tokens=len(self.ids),
            completion_tokens=self._writer.taken,
            rounds=sum(self._histogram),
            histogram=tuple(self._histogram),
            queued=(self.admitted or now) - self.arrived,
            first=first - self.arrived,
            seconds=now - self.arrived,
            decoding=now - first,
        )

    def _expire(self) -> None:
        if not self._ended:
            self._fail(Ended("time", f"the request took more than {self._seconds:g} s, which is all that one may take"))
            self._engine.leave(self)

    def _fail(self, error: Exception) -> None:
        self._finish()
        self._pieces.put_nowait(error)

    def _finish(self) -> None:
        self._ended = True
        if self._alarm is not None:
            self._alarm.cancel()


def _ended_by(error: Exception) -> Exception:
    """What a client is told: no traceback, and no words of another's text."""
    if isinstance(error, UserError | Ended):
        return error
    if isinstance(error, Unready):
        return Ended("engine", str(error))
    return Ended("fault", "the request failed inside the engine; other requests are not affected")
