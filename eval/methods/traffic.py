"""Requests that arrive at a rate, whoever is still waiting, against any server with OpenAI's API; and what each met."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2
import numpy as np

from frspec_jax.errors import UserError

PERCENTILES = (50, 90, 99)
DONE = "[DONE]"
Messages = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Target:
    """A server, and what is asked of its model."""

    url: str  # with /v1
    model: str
    key: str | None
    fields: dict[str, Any]  # of every request: max_tokens, temperature and so on
    seconds: float  # that a request may take


@dataclasses.dataclass
class Met:
    """One request: when it was sent, and what came back when; seconds since the run began."""

    sent: float
    arrivals: list[float] = dataclasses.field(default_factory=list)  # of each chunk with text
    tokens: int = 0  # as the server's usage says, or else the chunks
    ended: float = math.nan
    error: str | None = None

    @property
    def first(self) -> float | None:
        """Seconds to its first token."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def pace(self) -> float | None:
        """Seconds a token after the first, however they were bundled."""
        if len(self.arrivals) < 2 or self.tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks: the pauses that a reader sees."""
        return np.diff(self.arrivals).tolist()


def arrivals(rate: float, count: int, seed: int) -> np.ndarray:
    """When requests arrive, seconds [count]: Poisson at `rate` a second; an infinite rate is all at once."""
    if math.isinf(rate):
        return np.zeros(count)
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


async def models_of(url: str, key: str | None) -> list[str]:
    """The models that a server serves.

    Raises:
      UserError: nobody answers there, or not as an OpenAI server does.
    """
    try:
        async with httpx2.AsyncClient(headers=_headers(key), timeout=10) as client:
            reply = await client.get(f"{url}/models")
            reply.raise_for_status()
            return [str(model["id"]) for model in reply.json()["data"]]
    except httpx2.HTTPStatusError as error:
        raise UserError(
            f"--url {url} answers {error.response.status_code} at /models; check the address and the key"
        ) from None
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, TypeError):
        raise UserError(
            f"--url {url} is no server with OpenAI's API that answers; start one, or name another"
        ) from None


async def run(target: Target, prompts: Sequence[Messages], when: Sequence[float]) -> list[Met]:
    """Send each prompt when it is time, and wait for all."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(headers=_headers(target.key), timeout=target.seconds, limits=limits) as client:
        begun = time.perf_counter()

        async def later(prompt: Messages, at: float) -> Met:
            await asyncio.sleep(max(0.0, at - (time.perf_counter() - begun)))
            return await ask(client, target, prompt, begun)

        return await asyncio.gather(*(later(prompt, at) for prompt, at in zip(prompts, when, strict=True)))


async def ask(client: httpx2.AsyncClient, target: Target, prompt: Messages, begun: float) -> Met:
    """One chat, streamed."""
    body = {"model": target.model, "messages": prompt, "stream": True, **target.fields}
    body["stream_options"] = {"include_usage": True}
    met = Met(time.perf_counter() - begun)
    try:
        async with (
            asyncio.timeout(target.seconds),
            client.stream("POST", f"{target.url}/chat/completions", json=body) as r,
        ):
            if r.status_code != 200:
                met.error = f"status {r.status_code}"
            else:
                await _read(r.aiter_lines(), met, begun)
    except TimeoutError:
        met.error = "timeout"
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        met.error = type(error).__name__
    met.ended = time.perf_counter() - begun
    return met


async def _read(lines: AsyncIterator[str], met: Met, begun: float) -> None:
    whole = False
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == DONE:
            whole = True
            break
        event = json.loads(data)
        if "error" in event:
            met.error = "error in the stream"
            return
        if any(choice.get("delta", {}).get("content") for choice in event.get("choices", ())):
            met.arrivals.append(time.perf_counter() - begun)
        if event.get("usage"):
            met.tokens = int(event["usage"]["completion_tokens"])
    if not whole:
        met.error = "stream cut short"
    met.tokens = met.tokens or len(met.arrivals)


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def summary(rate: float, met: Sequence[Met]) -> dict[str, Any]:
    """The figures of one rate; times in seconds, over the requests that were answered."""
    good = [one for one in met if one.error is None]
    errors: dict[str, int] = {}
    for one in met:
        if one.error is not None:
            errors[one.error] = errors.get(one.error, 0) + 1
    span = max(one.ended for one in met) - min(one.sent for one in met)
    tokens = sum(one.tokens for one in good)
    return {
        "rate": None if math.isinf(rate) else rate,  # null: all at once
        "requests": len(met),
        "answered": len(good),
        "errors": errors,
        "seconds": round(span, 2),
        "requests_per_second": round(len(good) / span, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / span, 2),
        "most_at_once": most_at_once(met),
        "first_token": percentiles([one.first for one in good if one.first is not None]),
        "between_tokens": percentiles([one.pace for one in good if one.pace is not None]),
        "between_chunks": percentiles([gap for one in good for gap in one.gaps]),
        "whole": percentiles([one.ended - one.sent for one in good]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Percentiles and the mean; None where there is nothing."""
    if not values:
        return None
    found = {f"p{p}": round(float(np.percentile(values, p)), 5) for p in PERCENTILES}
    return found | {"mean": round(float(np.mean(values)), 5)}


def most_at_once(met: Sequence[Met]) -> int:
    """How many requests were on their way at the same time."""
    steps = sorted([(one.sent, 1) for one in met] + [(one.ended, -1) for one in met])
    return int(np.cumsum([step for _, step in steps]).max())
