"""What a pace would make of texts that are known, at given costs: the rounds that decode, with the target told.

Each round is `paced.paced_round` itself, but for its pass through the target, which looks up what the target made of
the text. What it would have cost is read off the table of costs, so that nothing but decisions is simulated. Perfect
hindsight is a bound: it knows which nodes are right before it drafts and verifies, and does no more than it needs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from eval.methods import replay
from frspec_jax import kv_cache, lookup
from frspec_jax.api import Generator, Request
from frspec_jax.drafters.base import Accepted
from frspec_jax.pace import Costs
from frspec_jax.pace_tables import forced
from frspec_jax.paced import paced_round
from frspec_jax.plan import EXACT, Plan
from frspec_jax.stages import Verdict, turn_of
from frspec_jax.state import FULL, RUNNING, Asked, Caches, DecodeState, Weights, state_after
from frspec_jax.together import Together
from frspec_jax.tree import ALL_THE_WAY, Candidates, DraftTree

CHASES = 4  # of hindsight's price: each from the rate that the last one led to


@dataclasses.dataclass(frozen=True)
class Policy:
    """How rounds are decided: by what pays, always alike, or knowing what is right."""

    name: str
    always: tuple[int, int] | None = None  # index of the size that is verified, and levels drafted
    lookup: bool = True
    hindsight: bool = False


@dataclasses.dataclass(frozen=True)
class Simulated:
    """What rounds would have brought, and cost by the table."""

    tokens: int
    rounds: int
    milliseconds: float

    def __add__(self, other: Simulated) -> Simulated:
        sums = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Simulated(*(a + b for a, b in sums))


def policies(sizes: Sequence[int], deepest: int) -> list[Policy]:
    """Vanilla, a fixed tree as papers have it, and a pace by and by: sizes and levels that pay, then copying too."""
    four = min(range(len(sizes)), key=lambda index: abs(sizes[index] - 4))
    return [
        Policy("vanilla", always=(0, 0), lookup=False),
        Policy(f"fixed: {sizes[four]} nodes, 2 levels", always=(four, min(2, deepest)), lookup=False),
        Policy("what pays, without copying", lookup=False),
        Policy("what pays"),
        Policy("perfect hindsight", hindsight=True),
    ]


@struct.dataclass
class Known:
    """A text, and what the target makes of it."""

    text: Array  # [S + 1] int32, -1 behind its end
    features: Array  # [S, (1 + taps) H]


def simulated(model: Generator, text: list[int], prompt: int, policy: Policy) -> Simulated:
    """A policy's rounds over a text whose first `prompt` tokens are given; a `model` with a pace, whose costs hold."""
    plan, weights = model.plan(), model.weights
    assert plan.pace is not None and weights.pace is not None
    within = dataclasses.replace(plan.pace, lookup=policy.lookup)
    plan = dataclasses.replace(plan, pace=within)
    if policy.always == (0, 0):  # a pace that never finds a draft to pay still tries one now and then
        many = len(text) - prompt - 1
        return Simulated(many, many, many * float(weights.pace.costs.verify[0]))
    costs, size = weights.pace.costs, kv_cache.rounded_capacity(len(text) + 2 * plan.margin + replay.PASS)
    with jax.enable_x64(False):
        tokens, features = replay.padded(text, -1, size + 1), replay.features_of(model, text, size)
        known = Known(jnp.asarray(tokens), features)
        memory = replay.read_prompt(model, tokens, prompt, features)
        nothing = dataclasses.replace(plan.config, num_layers=1)  # of the target, which is not run
        caches = Caches(kv_cache.empty(nothing, size, model.runtime.dtype), memory, known.text)
        asked = Asked.of(Request().sampling, seed=0, limit=len(text) - prompt)
        state = state_after(plan, caches, known.features[prompt - 1], known.text[prompt], jnp.int32(prompt), asked)
        if policy.hindsight:
            found = _hindsight(plan, weights, known, state, 1 / costs.verify[0])
            for _ in range(CHASES):
                found = _hindsight(plan, weights, known, state, found[0] / jnp.maximum(found[2], 1e-9))
        else:
            found = _paced(
                plan, weights, known, state, costs if policy.always is None else forced(within, *policy.always)
            )
    return Simulated(int(found[0]), int(found[1]), float(found[2]))


Found = tuple[Array, Array, Array]  # tokens, rounds, milliseconds
Step = tuple[DecodeState, Array]  # the state, and milliseconds so far


@functools.partial(jax.jit, static_argnames=("plan",), compiler_options=EXACT)
def _paced(plan: Plan, weights: Weights, known: Known, state: DecodeState, decides: Costs) -> Found:
    """Rounds decided by the costs `decides`, to the text's end; they cost what `weights` say."""
    assert weights.pace is not None
    costs = weights.pace.costs
    by = dataclasses.replace(weights, pace=dataclasses.replace(weights.pace, costs=decides))

    def one(step: Step) -> Step:
        state = paced_round(plan, by, step[0], verify=functools.partial(_told, known))
        return state, step[1] + costs.draft[state.pulse.levels] + costs.verify[state.pulse.size]

    state, milliseconds = lax.while_loop(_runs, one, (state, jnp.float32(0)))
    return state.emitted - 1, state.rounds, milliseconds


def _runs(step: Step) -> Array:
    return step[0].finished == RUNNING


def _told(
    known: Known,
    plan: Plan,
    weights: Weights,
    cache: kv_cache.KVCache,
    tree: DraftTree,
    state: DecodeState,
    together: Together,
) -> tuple[Verdict, kv_cache.KVCache]:
    """`stages.verify` by a known text: nodes on its path get what the target said there; others are not asked."""
    at = state.length + tree.depth
    return Verdict(known.features[at], known.text[at + 1], None, None), cache


@functools.partial(jax.jit, static_argnames=("plan",), compiler_options=EXACT)
def _hindsight(plan: Plan, weights: Weights, known: Known, state: DecodeState, price: Array) -> Found:
    """Rounds that draft as many levels and verify as many nodes as bring most for their time, all of them right."""
    assert plan.pace is not None and weights.pace is not None
    costs, depth, growth = weights.pace.costs, plan.tree.depth, plan.pace.growth
    last, sizes = state.length + state.asked.limit - 1, np.array(plan.pace.sizes)
    drafts = np.arange(depth + 1)
    verify = costs.verify[np.minimum(np.searchsorted(sizes, drafts + 1), len(sizes) - 1)]

    def one(step: Step) -> Step:
        state, milliseconds = step
        turn = turn_of(state)
        lead, memory = plan.drafter.take_in(weights.draft, turn, state.caches.draft)
        offered, _, memory = plan.drafter.offer(weights.draft, growth, lead, turn, memory, ALL_THE_WAY)
        ahead = lax.dynamic_slice_in_dim(known.text, state.length + 1, depth)
        chain = jnp.cumprod(lookup.chain(known.text, state.length, depth).tokens == ahead).sum()
        reached = jnp.maximum(_reached(offered, plan.drafter.by_level(growth), ahead), chain)  # [levels + 1]
        possible = (drafts <= reached[:, None]) & (drafts < sizes[-1]) & (drafts <= last - state.length)
        worth = drafts + 1 - price * (costs.draft[:, None] + verify)
        best = jnp.argmax(jnp.where(possible, worth, -jnp.inf)).astype(jnp.int32)
        levels, many = best // (depth + 1), best % (depth + 1)
        count = jnp.minimum(many + 1, last - state.length)
        accepted = Accepted(
            lax.dynamic_slice_in_dim(known.features, state.length, depth + 1),
            jnp.maximum(lax.dynamic_slice_in_dim(known.text, state.length + 1, depth + 1), 0),
            count,
        )
        length = state.length + count
        state = dataclasses.replace(
            state,
            caches=dataclasses.replace(state.caches, draft=memory),
            accepted=accepted,
            length=length,
            root=known.text[length],
            emitted=state.emitted + count,
            rounds=state.rounds + 1,
            finished=jnp.where(length < last, RUNNING, FULL).astype(jnp.int32),
        )
        return state, milliseconds + costs.draft[levels] + verify[many]

    state, milliseconds = lax.while_loop(_runs, one, (state, jnp.float32(0)))
    return state.emitted - 1, state.rounds, milliseconds


def _reached(offered: Candidates, by_level: tuple[int, ...], ahead: Array) -> Array:
    """How deep the candidates of the first 0, 1, ... levels go along the text `ahead` [D]: [levels + 1] int32."""
    right, deep, first = jnp.zeros(0, bool), [jnp.int32(0)], 0
    for level, count in enumerate(by_level):
        here = slice(first, first + count)
        parent = offered.parent[here]
        above = jnp.concatenate([right, jnp.ones(1, bool)])[parent]  # the last stands for the root, -1
        right = jnp.concatenate([right, above & (offered.tokens[here] == ahead[level])])
        deep.append(jnp.where(right[first:].any(), level + 1, deep[-1]).astype(jnp.int32))
        first += count
    return jnp.stack(deep)
