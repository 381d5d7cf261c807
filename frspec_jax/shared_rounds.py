"""The rounds that the texts of a batch share: for how many texts they are compiled, and what they cost here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from frspec_jax import batched, pace_tables
from frspec_jax.batched import Report
from frspec_jax.defaults import has_amx
from frspec_jax.pace import Costs, Pace
from frspec_jax.plan import Plan
from frspec_jax.sampling import argument
from frspec_jax.state import STOPPED, DecodeState, Weights
from pallas_kernels import device

if TYPE_CHECKING:
    from frspec_jax.generator import Generator

# Nodes that texts of a batch have together where it may still pay to verify several of each: beyond so many rows a CPU
# takes as long for every further one. And of one text at most: each size that may be verified is compiled.
CPU_ROWS, AMX_ROWS, MOST_NODES = 16, 64, 4
MEASURED = 2  # repeats of each measurement, for several texts together


class SharedRounds:
    """A plan for each number of texts that rounds are compiled for, and the costs that its pace goes by."""

    def __init__(self, model: Generator, plan: Plan, sizes: tuple[int, ...]) -> None:
        """sizes: numbers of texts, ascending."""
        self.sizes = sizes
        self._model, self._plan = model, plan
        self._weights = {size: self._guessed(size) for size in sizes}

    def size_for(self, texts: int) -> int:
        """The number of texts whose program runs so many."""
        return next(size for size in self.sizes if size >= texts)

    def plan_of(self, size: int) -> Plan:
        """The rounds of so many texts."""
        pace = self._plan.pace
        return self._plan if pace is None else dataclasses.replace(self._plan, pace=pace_of_batch(pace, size))

    def run(self, state: DecodeState, slots: Sequence[int]) -> tuple[DecodeState, Report]:
        """A round of the texts in these slots, as many as one of the sizes. state: donated."""
        size = len(slots)
        return batched.decode(self.plan_of(size), self._weights[size], state, argument(slots, np.int32))

    def warm_up(self, size: int, state: DecodeState, spare: int) -> DecodeState:
        """Compile the rounds of so many texts, and find what they cost: measured before on this device, or now.

        state: donated; no text is being decoded. spare: the slot of nobody.
        """
        plan = self.plan_of(size)
        state, _ = self.run(state, [spare] * size)
        if plan.pace is None:
            return state
        name = pace_tables.name_of(plan, self._model.runtime.dtype, self._model.draft_vocab, size)
        costs = pace_tables.kept_costs(name, plan.pace)
        if costs is None and self._model.capacity >= pace_tables.room_to_measure(plan.pace, plan.tree):
            costs, state = self._measured(plan, size, state)
            pace_tables.keep_costs(name, plan.pace, costs)
        if costs is not None:
            self._weights[size] = pace_tables.with_costs(self._model.weights, costs)
        return state

    def _guessed(self, size: int) -> Weights:
        """What rounds of so many texts read, before anything is measured."""
        pace, weights = self.plan_of(size).pace, self._model.weights
        return weights if pace is None else pace_tables.with_costs(weights, pace_tables.guessed(pace))

    def _measured(self, plan: Plan, size: int, state: DecodeState) -> tuple[Costs, DecodeState]:
        """What rounds of so many texts cost, whatever the texts."""
        assert plan.pace is not None
        slots = argument(list(range(size)), np.int32)

        def timed(costs: Costs) -> float:
            nonlocal state
            weights = pace_tables.with_costs(self._model.weights, costs)
            state = jax.block_until_ready(pace_tables.begun_anew(state))
            begun = time.perf_counter()
            for _ in range(pace_tables.ROUNDS):
                state, report = batched.decode(plan, weights, state, slots)
            jax.block_until_ready(report)
            return 1e3 * (time.perf_counter() - begun) / pace_tables.ROUNDS

        drafts = len(plan.pace.sizes) > 1 and bool(plan.drafter.by_level(plan.pace.growth))
        endless = dataclasses.replace(state.asked, limit=state.asked.limit * 0 + 2**30)
        state = dataclasses.replace(state, asked=endless)
        costs = pace_tables.costs_by(timed, plan.pace, drafts=drafts, repeats=MEASURED)
        return costs, dataclasses.replace(state, finished=state.finished * 0 + STOPPED)


def ladder(slots: int) -> tuple[int, ...]:
    """How many texts a program is compiled for: fewer texts than slots do not wait for rows of nobody."""
    if device.current().platform == "gpu":  # where a few rows more cost nothing
        return (1, slots) if slots > 1 else (1,)
    return (*(2**power for power in range(slots.bit_length()) if 2**power < slots), slots)


def pace_of_batch(pace: Pace, texts: int) -> Pace:
    """What the rounds of so many texts choose from: on a CPU, no more nodes than it has rows to spare."""
    if device.current().platform == "gpu" or texts == 1:
        return pace
    room = min(MOST_NODES, (AMX_ROWS if has_amx() else CPU_ROWS) // texts)
    return dataclasses.replace(pace, sizes=(1, *[size for size in pace.sizes if 1 < size <= room][-1:]))
