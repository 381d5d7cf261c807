"""From tickets to an HTTP reply: whole, or as a stream of events; and what happens when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from frspec_jax.scheduler import Piece, Ticket
from frspec_jax.serve.faults import of_engine
from frspec_jax.serve.forms import Form, Whole, usage
from frspec_jax.serve.metrics import Metrics
from frspec_jax.tickets import Figures

log = logging.getLogger(__name__)
SENDING = 60.0  # seconds that a client may take, beyond a request's own time, to read what is there
STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy is to pass on each event as it comes
]
T = TypeVar("T")


class Gone(Exception):
    """The client has left."""


class Answer:
    """The answers to one request, counted as they are delivered."""

    def __init__(
        self, tickets: Sequence[Ticket], form: Form, metrics: Metrics, choices: int, about: dict[str, Any]
    ) -> None:
        """choices: how many each prompt has. about: what the request's log line says; it is filled in here."""
        self.tickets, self.form, self.metrics, self.about = tickets, form, metrics, about
        self.prompts = [len(ticket.ids) for ticket in tickets[::choices]]
        self.wholes = [Whole() for _ in tickets]
        self._figures: list[Figures | None] = [None] * len(tickets)
        self._completion = [0] * len(tickets)
        self._closed = False
        about |= {"id": form.id, "prompt_tokens": sum(self.prompts), "choices": len(tickets)}

    @property
    def used(self) -> dict[str, int]:
        return usage(self.prompts, sum(self._completion))

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all choices, in the order in which they come."""
        async with contextlib.aclosing(merged(self.tickets)) as source:
            async for index, piece in source:
                self.metrics.piece(piece, self._figures[index])
                if not any(self._figures):
                    self.about["first_token_seconds"] = round(piece.figures.first, 4)
                    self.about["queue_seconds"] = round(piece.figures.queued, 4)
                self._figures[index] = piece.figures
                self._completion[index] += piece.taken
                self.wholes[index].finish_reason = piece.finish_reason
                yield index, piece

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, the first of them once there is a first piece."""
        begun: set[int] = set()
        async with contextlib.aclosing(self.pieces()) as source:
            async for index, piece in source:
                chunks = [] if index in begun else self.form.opening(index)
                begun.add(index)
                for chunk in (*chunks, *self.form.chunks(index, piece)):
                    yield event(chunk)
        if self.form.usage_asked:
            yield event(self.form.usage_chunk(self.used))
        yield b"data: [DONE]\n\n"

    async def whole(self) -> dict[str, Any]:
        """The reply of a request that does not stream."""
        async with contextlib.aclosing(self.pieces()) as source:
            async for index, piece in source:
                self.wholes[index].add(piece)
        return self.form.whole(self.wholes, self.used)

    def close(self, outcome: str | None = None) -> None:
        """Count it, once; what still runs is cancelled. outcome: why it did not end by itself."""
        if self._closed:
            return
        self._closed = True
        for ticket, whole, figures in zip(self.tickets, self.wholes, self._figures, strict=True):
            ticket.close()
            self.metrics.ended(figures, whole.finish_reason or outcome or "error")
        reasons = [whole.finish_reason for whole in self.wholes if whole.finish_reason]
        self.about["completion_tokens"] = sum(self._completion)
        self.about["finish"] = outcome or ",".join(dict.fromkeys(reasons))
        rounds = sum(figures.rounds for figures in self._figures if figures)
        brought = sum(n * c for figures in self._figures if figures for n, c in enumerate(figures.histogram, 1))
        self.about["accepted_length"] = round(brought / rounds, 3) if rounds else None


async def merged(tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several answers as they come, each with its answer's number; the first error ends all."""
    came: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def pump(index: int, ticket: Ticket) -> None:
        try:
            async for piece in ticket:
                came.put_nowait((index, piece))
        except Exception as error:
            came.put_nowait((index, error))

    if len(tickets) == 1:
        async for piece in tickets[0]:
            yield 0, piece
        return
    tasks = [asyncio.create_task(pump(index, ticket)) for index, ticket in enumerate(tickets)]
    left = len(tickets)
    try:
        while left:
            index, one = await came.get()
            if isinstance(one, Exception):
                raise one
            left -= one.finish_reason is not None
            yield index, one
    finally:
        for task in tasks:
            task.cancel()


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def gone(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The work's result. Raises Gone: the client left first, and the work is cancelled."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.gather(working, leaving, return_exceptions=True)


async def reply(http: HttpRequest, answer: Answer, stream: bool, seconds: float) -> Response:
    """The reply to a request that the engine has taken; seconds: that it may take."""
    try:
        if not stream:
            body = await unless_gone(http.receive, answer.whole())
            answer.close()
            return JSONResponse(body)
        events = answer.events()
        # The first event decides: before it, an error is a real status and no event under 200.
        first = await unless_gone(http.receive, anext(events))
        return EventStream(first, events, answer, seconds + SENDING)
    except Gone:
        answer.close("disconnected")
        return Response(status_code=499)
    except BaseException as error:
        answer.close(getattr(error, "kind", "error"))
        raise


class EventStream(Response):
    """A stream whose headers go out with its first event. However it ends, the answer is closed."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], answer: Answer, seconds: float) -> None:
        super().__init__(status_code=200)
        self._first, self._events, self._answer, self._seconds = first, events, answer, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome: str | None = "disconnected"
        try:
            async with asyncio.timeout(self._seconds):
                outcome = await unless_gone(receive, self._send(send))
        except (Gone, TimeoutError):
            pass  # nobody reads
        finally:
            self._answer.close(outcome)

    async def _send(self, send: Send) -> str | None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        outcome = None
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            outcome = getattr(error, "kind", "error")
            fault = of_engine(error)
            if fault.code == "internal_error":
                log.exception("a stream has failed")
            await send({"type": "http.response.body", "body": event(fault.body), "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return outcome
