"""What stands before the routes: one log line a request, keys, the size and time of a body, and whatever is raised."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frspec_jax.serve.faults import ApiError, of_engine
from frspec_jax.serve.metrics import Metrics

log = logging.getLogger("frspec_jax.serve.requests")
BODY_SECONDS = 30.0  # to send a body in
QUIET = ("/health", "/ready", "/metrics", "/static")  # asked all the time, by machines


class Guard:
    """Outermost but for CORS, whose headers a refusal carries too."""

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[bytes], metrics: Metrics, retry_after: Callable[[], int]
    ) -> None:
        self.app, self.keys, self.metrics, self.retry_after = app, tuple(keys), metrics, retry_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        about: dict[str, Any] = {}
        scope["about"] = about

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if "id" in about:
                    message["headers"] = [*message["headers"], (b"x-request-id", about["id"].encode())]
            await send(message)

        try:
            self._check_key(scope)
            await self.app(scope, receive, noting)
        except Exception as error:
            fault = of_engine(error, self.retry_after())
            if fault.code == "internal_error":
                log.exception("a request has failed")
            if status:
                raise  # too late for a reply
            about["error"] = fault.code or fault.param  # never a message: a template's may quote the text
            await fault.response()(scope, receive, noting)
        finally:
            self._tell(scope, status, time.monotonic() - begun, about)

    def _tell(self, scope: Scope, status: int, seconds: float, about: dict[str, Any]) -> None:
        # An address that nothing has is somebody's text: it goes into neither.
        route = getattr(scope.get("route"), "path", None) or scope.get("route_path") or "other"
        self.metrics.replies.labels(route, str(status)).inc()
        if not route.startswith(QUIET):
            told = {"method": scope["method"], "path": route, "status": status, "seconds": round(seconds, 4), **about}
            log.info("request", extra={"fields": told})

    def _check_key(self, scope: Scope) -> None:
        if not self.keys or not scope["path"].startswith("/v1"):
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        # Every key is compared, each in a time that does not tell how much of it was right.
        right = [hmac.compare_digest(key.strip(), known) for known in self.keys]
        if kind.lower() != b"bearer" or not any(right):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


async def body_of(http: HttpRequest, most: int) -> bytes:
    """A request's body.

    Raises:
      ApiError: it is larger than `most` bytes, by its own word or by count, or takes too long to come.
    """
    declared = http.headers.get("content-length", "")
    too_large = ApiError(413, f"the body is larger than {most} bytes", headers={"Connection": "close"})
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                data += part
                if len(data) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, "the body did not come in time", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before its body was whole") from None
    return bytes(data)


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
