"""A round's stages as programs of their own: draft, verify and accept, to time them and to look between them."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from frspec_jax import stages
from frspec_jax.generator import Generator, Request
from frspec_jax.plan import EXACT, Plan
from frspec_jax.stages import Verdict
from frspec_jax.state import DecodeState, Weights

WARM_UP = 3  # rounds before stages are timed


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("state",), compiler_options=EXACT)
def draft_step(plan: Plan, weights: Weights, state: DecodeState) -> Any:
    """The drafting half of a round as a program of its own: a `DraftTree`, and the state."""
    tree, memory = stages.draft(plan, weights, state)
    return tree, replace(state, caches=replace(state.caches, draft=memory))


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("state",), compiler_options=EXACT)
def verify_step(plan: Plan, weights: Weights, state: DecodeState, tree: Any) -> Any:
    """The target's pass over a tree: the `stages.Verdict`, and the state."""
    verdict, cache = stages.verify(plan, weights, state.caches.target, tree, state)
    return verdict, replace(state, caches=replace(state.caches, target=cache))


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("state",), compiler_options=EXACT)
def accept_step(plan: Plan, state: DecodeState, tree: Any, verdict: Verdict) -> Any:
    """The end of a round: the state with the accepted path emitted and committed."""
    taken, cache = stages.take(plan, tree, verdict, state.caches.target, state)
    return stages.emit(plan, state, tree, taken, replace(state.caches, target=cache))


@dataclasses.dataclass(frozen=True)
class StageTimes:
    """Median milliseconds of a round's stages, each run as a program of its own."""

    draft: float
    verify: float
    accept: float


def stage_times(model: Generator, prompt: np.ndarray, request: Request, rounds: int = 24) -> StageTimes:
    """Time draft, verify and accept apart, over the rounds of one answer."""
    depth = model.tree.depth
    limit = min(model.check(prompt, request), (rounds + WARM_UP + 1) * (depth + 1))
    times: list[tuple[float, float, float]] = []

    def timed(plan: Plan, weights: Weights, state: DecodeState) -> DecodeState:
        start = time.perf_counter()
        tree, state = jax.block_until_ready(draft_step(plan, weights, state))
        drafted = time.perf_counter()
        verdict, state = jax.block_until_ready(verify_step(plan, weights, state, tree))
        verified = time.perf_counter()
        state = jax.block_until_ready(accept_step(plan, state, tree, verdict))
        times.append((drafted - start, verified - drafted, time.perf_counter() - verified))
        return state

    with model.begin(prompt, replace(request, max_new_tokens=limit)) as text:
        while len(times) < rounds + WARM_UP and not text.finished:
            text.drive(timed)
    # An answer of one token has no round to time.
    medians = [
        1e3 * statistics.median(column) for column in zip(*times[WARM_UP:] or times or [(0.0, 0.0, 0.0)], strict=True)
    ]
    return StageTimes(*medians)
