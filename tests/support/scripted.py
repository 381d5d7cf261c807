"""A batch that says what it is told, and an engine over it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np

from frspec_jax.batch import Fresh
from frspec_jax.errors import UserError
from frspec_jax.generator import Request
from frspec_jax.scheduler import Engine
from frspec_jax.writer import Writer
from tests.support import folders

TOKENIZER = folders.tokenizer()
LETTERS = TOKENIZER("abcdefghijklmnopqrstuvwxyz" * 8).input_ids


class Scripted:
    """A batch whose answers are the alphabet, two tokens a step; it counts and can be held."""

    def __init__(self, slots: int = 2) -> None:
        self.slots, self.texts = slots, {}
        self.order: list[int] = []  # seeds, as they were admitted
        self.gate = threading.Semaphore(10**9)
        self.fault: Exception | None = None  # of the next step
        self.faults: dict[int, Exception] = {}  # by slot, whose text ends with it
        self.steps = 0

    @property
    def free(self) -> int:
        return self.slots - len(self.texts)

    @property
    def busy(self) -> bool:
        return bool(self.texts)

    def check(self, ids: Any, request: Request) -> int:
        if len(ids) > 100:
            raise UserError("--context 100 is too short")
        return request.max_new_tokens

    def admit(self, ids: Any, request: Request) -> int:
        self.order.append(request.seed)
        if request.seed == 666:
            raise ValueError("no")
        slot = next(n for n in range(self.slots) if n not in self.texts)
        self.texts[slot] = [request, 0]
        return slot

    def cancel(self, slot: int) -> None:
        self.texts.pop(slot)

    def step(self) -> list[Fresh]:
        self.gate.acquire()
        self.steps += 1
        if self.fault is not None:
            raise self.fault
        return [self.fresh(slot) for slot in list(self.texts)]

    def fresh(self, slot: int) -> Fresh:
        if slot in self.faults:
            del self.texts[slot]
            return Fresh(slot, (), (), None, None, None, fault=self.faults.pop(slot))
        request, done = self.texts[slot]
        tokens = tuple(LETTERS[done : min(done + (2 if done else 1), request.max_new_tokens)])
        self.texts[slot][1] = done + len(tokens)
        reason = "length" if done + len(tokens) == request.max_new_tokens else None
        if reason:
            del self.texts[slot]
        return Fresh(slot, tokens, (1,) * len(tokens), None, reason, None)


def engine_over(*batches: Scripted, **limits: Any) -> Engine:
    builds = [lambda say, batch=batch: batch for batch in batches]
    return Engine(builds, lambda request: Writer(TOKENIZER, request.stop, (2,)), **limits)


def asked(tokens: int = 6, seed: int = 0, **fields: Any) -> tuple[np.ndarray, Request]:
    return np.arange(3), Request(tokens, seed=seed, **fields)


async def text_of(engine: Engine, tokens: int = 6, **fields: Any) -> str:
    return "".join([piece.text async for piece in engine.stream(*asked(tokens, **fields))])


def run(check: Any, batch: Scripted | None = None, **limits: Any) -> Scripted:
    batch = batch or Scripted()

    async def main() -> None:
        async with asyncio.timeout(20):
            async with engine_over(batch, **limits) as engine:
                await check(engine, batch)

    asyncio.run(main())
    return batch


async def until(true: Any) -> None:
    while not true():
        await asyncio.sleep(0.002)
