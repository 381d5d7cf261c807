"""The programs of a batch: a prompt's chunk into a slot, and a round of several texts together.

A batch is the round of one text under `vmap`: a product has the rows of all texts, and each text has a slot of its own
in a pool of caches (`pallas_kernels.batching`). Who sits in which slot is not known here (`batch.Batch`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from frspec_jax import engine, mesh_parts
from frspec_jax.config import Sampling
from frspec_jax.kv_cache import LayerKV
from frspec_jax.likelihood import Likelihood
from frspec_jax.pace import Pulse
from frspec_jax.penalties import Bearing, Penalties
from frspec_jax.plan import EXACT, Plan
from frspec_jax.prefill import Chunk, prefill_chunk, prefill_on_mesh
from frspec_jax.sharding import WHOLE, on_mesh
from frspec_jax.state import RUNNING, STOPPED, Asked, Caches, DecodeState, Weights, new_caches
from frspec_jax.together import Together

AXIS = "texts"  # of vmap

State = TypeVar("State")


def _shared(x: Any) -> bool:
    """Whether a part of a state is one for all texts: a pool, in which each has a slot, or what they share."""
    return isinstance(x, LayerKV | Bearing | Pulse)


def _map(f: Any, *states: State, shared: Any = lambda x, *_: x) -> State:
    """The state with `f` of every array that each text has for itself, and `shared` of the parts that are for all."""
    return jax.tree.map(lambda x, *more: (shared if _shared(x) else f)(x, *more), *states, is_leaf=_shared)


def _at(slot: Array | None, state: State) -> State:
    """The state as the text in a slot sees it; None: as nobody's."""

    def part(x: Any) -> Any:
        return x if isinstance(x, Pulse) else dataclasses.replace(x, slot=slot)

    return _map(lambda x: x, state, shared=part)


def _put(rows: Array, row: Array, slot: Array) -> Array:
    """Rows [slots, ...] with one of them written anew."""
    return lax.dynamic_update_index_in_dim(rows, jnp.asarray(row, rows.dtype), slot, 0)


def new_state(plan: Plan, weights: Weights, capacity: int, slots: int, dtype: Any) -> DecodeState:
    """A state whose arrays are those of `slots` texts, [slots, ...] each, none of which is being decoded."""

    def one(weights: Weights) -> DecodeState:
        zeros = np.zeros((), np.int32)
        chunk = Chunk(np.zeros(2, np.int32), zeros, zeros + 1, zeros > 0)  # type: ignore[arg-type]
        caches, asked = new_caches(plan, capacity, dtype), Asked.of(Sampling(), seed=0, limit=1)
        bearing = Bearing.on_nothing(1, plan.config.vocab_size)
        penalties = Penalties.of(Sampling(), jax.tree.map(lambda x: x[0], bearing)) if plan.adjusts else None
        return prefill_on_mesh(plan, weights, caches, chunk, asked, penalties)

    def many(x: Any) -> Any:
        return jnp.zeros((slots, *x.shape), x.dtype)

    def pools(x: Any) -> Any:
        return jax.tree.map(jnp.copy, Pulse.still()) if isinstance(x, Pulse) else jax.tree.map(many, x)

    state = _map(many, jax.eval_shape(one, weights), shared=pools)
    return dataclasses.replace(state, finished=state.finished + STOPPED)


@struct.dataclass
class Reading:
    """A chunk of a prompt that is read into a slot."""

    slot: Array  # int32
    chunk: Chunk
    asked: Asked
    text: Array | None  # [S + 1] int32, the whole prompt from position 1 on; None where nobody reads it
    penalties: Penalties | None  # of the request, where the plan adjusts; its bearing is that of the slot


@struct.dataclass
class Report:
    """What a round, or the end of a prompt, brought each of b texts."""

    tokens: Array  # [b, D+1] int32
    count: Array  # [b] int32, how many of them are new
    origins: Array  # [b, D+1] int8
    finished: Array  # [b] int32
    rounds: Array  # [b] int32, so far
    histogram: Array  # [b, D+1] int32, so far
    likelihood: Likelihood | None


def _report(state: DecodeState, count: Array) -> Report:
    return Report(state.output, count, state.origins, state.finished, state.rounds, state.histogram, state.likelihood)


def read_chunk(plan: Plan, weights: Weights, state: DecodeState, reading: Reading) -> tuple[DecodeState, Report]:
    """Read a chunk of a prompt into its slot. With the last one the text begins, and its first token is reported."""
    slot = reading.slot
    mine = _at(slot, state)
    remembered = _map(lambda rows: rows[slot], mine.caches.draft)  # what a drafter keeps of each text beside the pools
    caches = Caches(mine.caches.target, remembered, reading.text)
    penalties = reading.penalties
    if penalties is not None and mine.penalties is not None:
        penalties = dataclasses.replace(penalties, bearing=mine.penalties.bearing)
    new = prefill_chunk(plan, weights, caches, reading.chunk, reading.asked, penalties)
    # The pulse is that of the rounds, and a new text changes nothing in it.
    new = dataclasses.replace(_at(None, new), pulse=state.pulse)
    after = _map(lambda rows, row: _put(rows, row, slot), state, new, shared=lambda _, x: x)
    return after, jax.tree.map(lambda x: x[None], _report(new, jnp.int32(1)))


def _on_mesh(program: Callable[..., Any]) -> Callable[..., Any]:
    """A program of a plan, weights, a batch's state and more, on the plan's mesh."""

    @functools.wraps(program)
    def run(plan: Plan, weights: Weights, state: DecodeState, more: Any) -> Any:
        where = mesh_parts.state_on(plan, state.caches)
        given = (mesh_parts.weights_on(plan, weights), where, WHOLE)
        return on_mesh(functools.partial(program, plan), plan.mesh, given, (where, WHOLE))(weights, state, more)

    return jax.jit(run, static_argnames=("plan",), compiler_options=EXACT, donate_argnames=("state",))


read = _on_mesh(read_chunk)


def decode_slots(plan: Plan, weights: Weights, state: DecodeState, slots: Array) -> tuple[DecodeState, Report]:
    """A round of the texts in `slots` [b] int32, of which some may have finished."""

    def one(mine: DecodeState, slot: Array) -> DecodeState:
        running = mine.finished == RUNNING
        after = engine.decode_round(plan, weights, _at(slot, mine), Together(AXIS, running))
        # A finished text stays where it is: the rows that its rounds write lie behind its end.
        length, emitted, finished, rounds = (
            jnp.where(running, new, old)
            for new, old in (
                (after.length, mine.length),
                (after.emitted, mine.emitted),
                (after.finished, mine.finished),
                (after.rounds, mine.rounds),
            )
        )
        after = dataclasses.replace(after, length=length, emitted=emitted, finished=finished, rounds=rounds)
        return _at(None, after)

    axes = _map(lambda _: 0, state, shared=lambda _: None)
    mine = _map(lambda rows: rows[slots], state)
    after = jax.vmap(one, in_axes=(axes, 0), out_axes=axes, axis_name=AXIS)(mine, slots)
    every = _map(lambda rows, row: rows.at[slots].set(row), state, after, shared=lambda _, x: x)
    return every, _report(after, after.emitted - mine.emitted)


decode = _on_mesh(decode_slots)


@functools.partial(jax.jit, donate_argnames=("state",))
def bear_on(state: DecodeState, slot: Array, bearing: Bearing) -> DecodeState:
    """What a request's penalties bear on, put into its slot."""
    assert state.penalties is not None
    pool = state.penalties.bearing
    new = jax.tree.map(lambda rows, row: _put(rows, row, slot), pool, bearing)
    return dataclasses.replace(state, penalties=dataclasses.replace(state.penalties, bearing=new))


@functools.partial(jax.jit, donate_argnames=("state",))
def copy_slot(state: DecodeState, source: Array, target: Array) -> DecodeState:
    """The caches of one slot, copied into another: what two prompts have in common is read once."""

    def copied(rows: Array) -> Array:
        return _put(rows, lax.dynamic_index_in_dim(rows, source, keepdims=False), target)

    def pool(x: Any) -> Any:
        return jax.tree.map(copied, x) if isinstance(x, LayerKV) else x

    target_cache = _map(lambda x: x, state.caches.target, shared=pool)
    draft = _map(copied, state.caches.draft, shared=pool)  # what a drafter keeps of each text beside the pools, too
    return dataclasses.replace(state, caches=dataclasses.replace(state.caches, target=target_cache, draft=draft))
