"""Many requests at once, one after the other within a step: a stand-in until the batched round is there."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np

from frspec_jax.config import Sampling
from frspec_jax.generator import Generator, Request, Result, Text


@dataclasses.dataclass(frozen=True)
class Likely:
    """One emitted token's log-probabilities."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Fresh:
    """What one step brought one request."""

    slot: int
    tokens: tuple[int, ...]
    origins: tuple[int, ...]
    logprobs: tuple[Likely, ...] | None
    finish_reason: str | None
    result: Result | None


class Batch:
    """Slots that requests begin in; one thread drives it."""

    def __init__(self, model: Generator, slots: int) -> None:
        self._model, self.slots = model, slots
        self._waiting: dict[int, tuple[np.ndarray, Request]] = {}
        self._texts: dict[int, tuple[contextlib.ExitStack, Text, int]] = {}
        self._turn = 0

    @property
    def free(self) -> int:
        """Slots that a request may begin in now."""
        return self.slots - len(self._waiting) - len(self._texts)

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._waiting or self._texts)

    def check(self, ids, request: Request) -> int:
        """How many tokens may be emitted."""
        return self._model.check(ids, request)

    def warm_up(self) -> None:
        """Compile what requests need."""
        self._model.warm_up()
        self._model.warm_up(Sampling(temperature=1.0))

    def admit(self, ids: np.ndarray, request: Request) -> int:
        """Takes a free slot."""
        slot = next(n for n in range(self.slots) if n not in self._waiting and n not in self._texts)
        self._model.check(ids, request)
        self._waiting[slot] = (ids, request)
        return slot

    def cancel(self, slot: int) -> None:
        """The slot is free at once."""
        self._waiting.pop(slot, None)
        if slot in self._texts:
            self._texts.pop(slot)[0].close()

    def step(self) -> list[Fresh]:
        """One piece of work."""
        self._turn += 1
        if self._waiting and (self._turn % 2 or not self._texts):
            slot = next(iter(self._waiting))
            ids, request = self._waiting.pop(slot)
            stack = contextlib.ExitStack()
            text = stack.enter_context(self._model.begin(ids, request))
            self._texts[slot] = (stack, text, 0)
            return [self._fresh(slot)]
        for _, text, _ in self._texts.values():
            text.advance(1)
        return [self._fresh(slot) for slot in list(self._texts)]

    def _fresh(self, slot: int) -> Fresh:
        stack, text, shown = self._texts[slot]
        tokens = tuple(text.tokens[shown:])
        origins = tuple(np.asarray(text.state.origins)[shown : shown + len(tokens)].tolist())
        self._texts[slot] = (stack, text, shown + len(tokens))
        result = text.result()
        if text.finished:
            self.cancel(slot)
        return Fresh(slot, tokens, origins, None, result.finish_reason, result if text.finished else None)
