"""The decode loop: one compiled round, and the loop of rounds that generation and streaming share.

A round drafts a tree, verifies it in one pass of the target, and emits the longest path that the
target itself would have taken, and one token more. Vanilla decoding is the same round with a tree of
one node; greedy decoding is the same choice with no noise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from frspec_jax.mesh_parts import state_on, weights_on
from frspec_jax.paced import paced_round
from frspec_jax.plan import EXACT, Plan
from frspec_jax.sharding import WHOLE, on_mesh
from frspec_jax.stages import draft, emit, take, verify
from frspec_jax.state import RUNNING, DecodeState, Weights
from frspec_jax.together import ALONE, Together
from pallas_kernels.tree_attention import attention_rows


def decode_round(plan: Plan, weights: Weights, state: DecodeState, together: Together = ALONE) -> DecodeState:
    """One round: draft, verify, accept.

    together: where the text is one of several under `vmap`, what they decide together.
    """
    if plan.pace is not None:
        return paced_round(plan, weights, state, together)
    tree, memory = draft(plan, weights, state)
    verdict, cache = verify(plan, weights, state.caches.target, tree, state, together)
    taken, cache = take(plan, tree, verdict, cache, state, together)
    return emit(plan, state, tree, taken, dataclasses.replace(state.caches, target=cache, draft=memory))


def decode_rounds(plan: Plan, weights: Weights, state: DecodeState, rounds: Array) -> DecodeState:
    """Decode until the sequence is finished, or `rounds` more rounds are done: 1 streams, many generate."""
    last = state.rounds + rounds

    def on(state: DecodeState) -> Array:
        return (state.finished == RUNNING) & (state.rounds < last)

    def stretch(rows: int, state: DecodeState) -> DecodeState:
        """The rounds that fit `rows` rows."""
        here = plan.within(rows)
        return lax.while_loop(
            lambda s: on(s) & (s.length + plan.margin <= rows), lambda s: decode_round(here, weights, s), state
        )

    sizes = attention_rows(state.caches.capacity, plan.kernels.attention)
    if len(sizes) == 1:
        return lax.while_loop(on, lambda s: decode_round(plan, weights, s), state)
    # Chosen between rounds, so that no round waits for it.
    smaller = jnp.array(sizes[:-1], jnp.int32)
    stretches = [functools.partial(stretch, rows) for rows in sizes]
    return lax.while_loop(
        on, lambda s: lax.switch((s.length + plan.margin > smaller).sum(dtype=jnp.int32), stretches, s), state
    )


# What advances a state: `run` with a number of rounds, or a driver of one's own (`python -m eval loops` has three).
Step = Callable[[Plan, Weights, DecodeState], DecodeState]


@functools.wraps(decode_rounds)
def rounds_on_mesh(plan: Plan, weights: Weights, state: DecodeState, rounds: Array) -> DecodeState:
    program, where = functools.partial(decode_rounds, plan), state_on(plan, state.caches)
    return on_mesh(program, plan.mesh, (weights_on(plan, weights), where, WHOLE), where)(weights, state, rounds)


run = jax.jit(rounds_on_mesh, static_argnames=("plan",), donate_argnames=("state",), compiler_options=EXACT)
