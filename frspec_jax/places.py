"""The places of a batch: what each slot's caches hold, whoever left it there, and which slot suits a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass
class Place:
    """A slot in the pools, and the text that its caches hold."""

    history: list[int] = dataclasses.field(default_factory=list)  # tokens whose rows are sound in every cache
    used: int = 0  # the step at which it was left


@dataclasses.dataclass(frozen=True)
class Choice:
    """A slot for a prompt."""

    slot: int
    held: int  # tokens of the prompt that need not be read
    source: int | None  # the slot whose caches are copied into this one first; None: nothing is copied


class Places:
    """The places of all slots."""

    def __init__(self, slots: int) -> None:
        self._places = [Place() for _ in range(slots)]

    def choose(self, prompt: np.ndarray, free: Sequence[int], short: int) -> Choice:
        """One of the free slots for a prompt [T].

        A slot that holds the beginning is gone on with, if it is free; else what it holds is copied, if that saves at
        least a chunk. A beginning is whole short chunks, and never all of the prompt: its last token has to be run.
        """

        def held(slot: int) -> int:
            return min(_common(self._places[slot].history, prompt), len(prompt) - 1) // short * short

        def used(slot: int) -> int:
            return self._places[slot].used

        best = max(free, key=lambda slot: (held(slot), -used(slot)))
        source = max(range(len(self._places)), key=held)
        if held(source) > held(best):
            return Choice(min(free, key=used), held(source), source)
        if not held(best):
            best = min(free, key=used)
        return Choice(best, held(best), None)

    def holds(self, slot: int, tokens: list[int]) -> None:
        """Note what the caches of a slot hold."""
        self._places[slot].history = tokens

    def left(self, slot: int, step: int) -> None:
        """Note when a slot was left."""
        self._places[slot].used = step


def _common(history: list[int], prompt: np.ndarray) -> int:
    """How many tokens both begin with alike."""
    count = min(len(history), len(prompt))
    differs = np.nonzero(np.asarray(history[:count]) != prompt[:count])[0]
    return int(differs[0]) if differs.size else count
