"""Errors in OpenAI's form, so that clients raise their own typed exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from frspec_jax.errors import UserError
from frspec_jax.scheduler import Ended, Overloaded, Unready

KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told. `param` names the field, and the message says the mend without repeating the input."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    """A mistake of the client's."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, reason: str = "is not supported by this server; leave it out") -> ApiError:
    """A field that would change the text, and that nothing here follows."""
    return ApiError(400, f"'{param}' {reason}", param=param, code="unsupported_parameter")


def of_engine(error: Exception, retry_after: int = 1) -> ApiError:
    """What the engine raised, for a client."""
    again = {"Retry-After": str(retry_after)}
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), code="rate_limit_exceeded", headers=again)
    if isinstance(error, Unready):
        return ApiError(503, str(error), code="engine_dead" if error.dead else "not_ready", headers=again)
    if isinstance(error, Ended):
        status, code = {"time": (504, "timeout"), "engine": (503, "not_ready")}.get(error.kind, (500, "engine_fault"))
        return ApiError(status, str(error), code=code)
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed in this request; its log says of what", code="internal_error")


def on_http_exception(request: HttpRequest, error: Exception) -> JSONResponse:
    """No route, or not this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = "there is nothing at this address; see /v1/models, /v1/chat/completions and /v1/completions"
    elif error.status_code == 405:
        message = f"{request.method} is not allowed at this address"
    else:
        message = str(error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()
