"""The addresses that clients ask, over an engine."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from frspec_jax.config import Sampling
from frspec_jax.errors import UserError
from frspec_jax.request import Request
from frspec_jax.scheduler import Engine
from frspec_jax.serve.faults import ApiError, on_http_exception, wrong
from frspec_jax.serve.fields import ChatFields, CompletionFields, Fields, read
from frspec_jax.serve.forms import ChatForm, CompletionForm, Form
from frspec_jax.serve.guard import Guard, body_of
from frspec_jax.serve.replies import Answer, reply
from frspec_jax.serve.served import Served

log = logging.getLogger(__name__)
UNBOUNDED = 2**30  # tokens: as many as there is room for
PAGE_HEADERS = {
    # The page shows what a model writes: whatever that is, nothing of it runs or is fetched.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def application(served: Served) -> Starlette:
    """The server's app; what it serves may still be loading."""
    routes = [
        Route("/", lambda _: _page(), methods=["GET"]),
        Mount("/static", StaticFiles(packages=[("frspec_jax.serve", "static")])),
        Route("/health", _with(served, health), methods=["GET"]),
        Route("/ready", _with(served, ready), methods=["GET"]),
        Route("/metrics", _with(served, metrics), methods=["GET"]),
        Route("/v1/models", _with(served, models), methods=["GET"]),
        Route("/v1/models/{name:path}", _with(served, model), methods=["GET"]),
        Route("/v1/chat/completions", _with(served, chat), methods=["POST"]),
        Route("/v1/completions", _with(served, completions), methods=["POST"]),
    ]
    settings = served.settings
    middleware = [
        Middleware(
            Guard,
            keys=settings.keys,
            metrics=served.metrics,
            retry_after=lambda: served.engine.retry_after,
        )
    ]
    if settings.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
        middleware.insert(0, cors)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: on_http_exception})
    app.router.redirect_slashes = False
    return app


Handler = Callable[[Served, HttpRequest], Awaitable[Response]]


def _with(served: Served, handler: Handler) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def bound(http: HttpRequest) -> Response:
        return await handler(served, http)

    return bound


def _page() -> Response:
    html = resources.files("frspec_jax.serve").joinpath("static/index.html").read_text("utf-8")
    return Response(html, media_type="text/html", headers=PAGE_HEADERS)


# How it is -------------------------------------------------------------------------------------------


async def health(served: Served, _: HttpRequest) -> Response:
    """200 as long as the process can still serve, loading included; 503 once only a restart helps."""
    state = served.engine.state
    return JSONResponse({"status": state}, 503 if state in ("dead", "closed") else 200)


async def ready(served: Served, _: HttpRequest) -> Response:
    """200 while requests are taken; until then, how far loading is."""
    engine = served.engine
    body = {"status": engine.state, "progress": engine.progress}
    return JSONResponse(body, 200 if engine.state == "ready" else 503)


async def metrics(served: Served, _: HttpRequest) -> Response:
    return Response(served.metrics.text(), media_type="text/plain; version=0.0.4")


async def models(served: Served, _: HttpRequest) -> Response:
    return JSONResponse({"object": "list", "data": [served.card(name) for name in served.settings.names]})


async def model(served: Served, http: HttpRequest) -> Response:
    return JSONResponse(served.card(_served_name(served, http.path_params["name"])))


def _served_name(served: Served, name: str) -> str:
    names = served.settings.names
    if name not in names:
        message = f"this server has no such model; it serves {', '.join(names)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return name


# What it answers -------------------------------------------------------------------------------------


async def chat(served: Served, http: HttpRequest) -> Response:
    """POST /v1/chat/completions."""
    fields = read(ChatFields, await body_of(http, served.settings.body_bytes))
    engine = await _engine(served, fields)
    ids = await asyncio.to_thread(served.encoder.chat, fields.messages)
    form = ChatForm(**_form_arguments(served, fields))
    return await _answer(served, http, engine, fields, [ids], "messages", form)


async def completions(served: Served, http: HttpRequest) -> Response:
    """POST /v1/completions."""
    fields = read(CompletionFields, await body_of(http, served.settings.body_bytes))
    engine = await _engine(served, fields)
    given = _prompts(fields.prompt)
    _check_choices(served, len(given), fields.choices)
    prompts = await asyncio.to_thread(lambda: [_encoded(served, one) for one in given])
    echoes: list[str] = []
    if fields.echo:
        texts = [one if isinstance(one, str) else served.text_of(ids) for one, ids in zip(given, prompts, strict=True)]
        echoes = [text for text in texts for _ in range(fields.choices)]
    form = CompletionForm(**_form_arguments(served, fields), echoes=echoes)
    return await _answer(served, http, engine, fields, prompts, "prompt", form)


def _prompts(prompt: Any) -> list[str | list[int]]:
    """A prompt is a text, token ids, or a list of either."""
    if prompt is None:
        raise wrong("prompt", "you must provide 'prompt'", "missing_required_parameter")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(one) is int for one in prompt)):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(one, str) for one in prompt):
            return prompt
        if all(isinstance(one, list) and one and all(type(n) is int for n in one) for one in prompt):
            return prompt
    raise wrong("prompt", "'prompt' must be a text, a list of token ids, or a list of either, and none of them empty")


def _encoded(served: Served, prompt: str | list[int]) -> np.ndarray:
    return served.encoder.text(prompt) if isinstance(prompt, str) else served.encoder.given(prompt, "prompt")


async def _engine(served: Served, fields: Fields) -> Engine:
    """The engine for a request, which is of a served model and has no more choices than are taken."""
    _served_name(served, fields.model)
    engine = await served.engine_for(fields.speculative is not False)
    _check_choices(served, 1, fields.choices)
    for name in fields.unknown:
        served.note_unknown(name)
    return engine


def _check_choices(served: Served, prompts: int, n: int) -> None:
    most = min(served.settings.choices, served.engine.most)
    if prompts * n > most:
        param = "n" if prompts == 1 else "prompt"
        raise wrong(param, f"'{param}' asks for {prompts * n} answers at once; at most {most} are given to one request")


def _form_arguments(served: Served, fields: Fields) -> dict[str, Any]:
    return {
        "name": fields.model,
        "key": secrets.token_hex(12),
        "tokens": served.token_bytes,
        "origins": bool(fields.origins),
        "usage_asked": fields.includes_usage,
    }


async def _answer(
    served: Served,
    http: HttpRequest,
    engine: Engine,
    fields: ChatFields | CompletionFields,
    prompts: Sequence[np.ndarray],
    param: str,
    form: Form,
) -> Response:
    settings, limit = served.settings, fields.limit
    sampling, seed, stop = _sampling(served, fields), fields.seed, fields.stops()
    seed = secrets.randbits(63) if seed is None else seed
    asked = []
    for ids in prompts:
        room = _room(engine, ids, limit, param)
        for sequence in range(fields.choices):
            request = Request(room, sampling, seed, sequence=sequence, stop=stop, logprobs=fields.top)
            asked.append((ids, request))
    tickets = engine.submit(asked, seconds=settings.seconds)
    about = http.scope["about"]
    about |= {"model": fields.model, "stream": fields.streams}
    answer = Answer(tickets, form, served.metrics, fields.choices, about)
    return await reply(http, answer, fields.streams, settings.seconds)


def _room(engine: Engine, ids: np.ndarray, limit: int | None, param: str) -> int:
    """Tokens that an answer may have. Raises ApiError: the prompt does not fit, or not with what is asked for."""
    probe = Request(UNBOUNDED)
    try:
        room = engine.room(ids, probe)
    except UserError:
        room = 0
    if room and (limit is None or limit <= room):
        return room if limit is None else limit
    context = engine.room(ids[:1], probe) + 1
    wanted = "an answer" if limit is None else f"{limit} tokens of an answer"
    raise wrong(
        param,
        f"this model's context is {context} tokens, prompt and answer together; the prompt has {len(ids)}, "
        f"and {wanted} would follow; shorten one of them",
        "context_length_exceeded",
    )


def _sampling(served: Served, fields: Fields) -> Sampling:
    top_k = max(0, fields.top_k or 0)
    top_p = 1.0 if fields.top_p is None else fields.top_p
    return Sampling(
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_k=top_k if top_p else 1,  # a share of nothing keeps the best token alone
        top_p=top_p or 1.0,
        min_p=fields.min_p or 0.0,
        repetition_penalty=fields.repetition_penalty or 1.0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=fields.biases(served.vocab_size),
    )
