"""A round that drafts and verifies as much as pays: what it is worth and what it costs, `pace` says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from frspec_jax import lookup, pace
from frspec_jax.drafters.base import Accepted, DraftMemory
from frspec_jax.kv_cache import KVCache
from frspec_jax.pace import Growing
from frspec_jax.plan import Plan
from frspec_jax.stages import Taken, Verdict, emit, take, turn_of, verify
from frspec_jax.state import Caches, DecodeState, Weights
from frspec_jax.together import ALONE, Together
from frspec_jax.tree import Candidates, best_first


def paced_round(
    plan: Plan,
    weights: Weights,
    state: DecodeState,
    together: Together = ALONE,
    verify: Callable[..., tuple[Verdict, KVCache]] = verify,
) -> DecodeState:
    """One round that drafts and verifies as much as pays (`frspec_jax.pace`); verify: what asks the target."""
    assert plan.pace is not None and weights.pace is not None
    costs, drafter, turn, pulse = weights.pace.costs, plan.drafter, turn_of(state), state.pulse
    price, trust = pulse.price(costs, together.count), state.trust.scale
    depth, by_level = plan.tree.depth, drafter.by_level(plan.pace.growth)
    if len(plan.pace.sizes) == 1:  # nothing that is drafted would be verified
        by_level = ()

    with jax.named_scope("lookup"):  # what stands in the text costs no drafting
        found, likely = jnp.zeros(0, jnp.int32), jnp.zeros(0)
        if plan.pace.lookup:
            assert state.caches.text is not None
            chain = lookup.chain(state.caches.text, state.length, depth)
            found, likely = chain.tokens, pace.copied(weights.pace.odds, chain, trust[pace.COPIED])
        unknown = together.total(1 - jnp.exp(likely[0])) if plan.pace.lookup else together.count
        undrafted = pace.best_size(plan.pace, costs, price, likely, together)
        drafts = pace.drafting_pays(costs, price, pulse, unknown) if by_level else jnp.bool_(False)
        # What was accepted waits until something is drafted, or there is no room for what this round may bring.
        room = jnp.where(undrafted.index == 0, 1, depth + 1)
        takes_in = drafts | together.any(turn.accepted.count + room > depth + 1)

    Drafted = tuple[Candidates, Array, DraftMemory]

    def take_in(memory: DraftMemory) -> DraftMemory:
        return drafter.take_in(weights.draft, turn, memory)[1]

    def offer(nothing: Drafted) -> Drafted:
        assert plan.pace is not None and weights.pace is not None
        lead, memory = drafter.take_in(weights.draft, turn, nothing[2])
        going = Growing(plan.pace, weights.pace, price, trust[pace.DRAFTED], together)
        return drafter.offer(weights.draft, plan.pace.growth, lead, turn, memory, going)

    with jax.named_scope("draft"):
        memory = pace.when(takes_in & ~drafts, take_in, state.caches.draft)
        drafted, levels, memory = nothing = Candidates.none(sum(by_level)), jnp.int32(0), memory
        if by_level:
            drafted, levels, memory = pace.when(drafts, offer, nothing)

    with jax.named_scope("rerank"):
        candidates = pace.joined(drafted, by_level, found, likely)
        tree, kept = best_first(plan.tree, candidates, state.root)
        copied = jnp.concatenate([jnp.zeros(1, bool), kept >= drafted.count])
        tree = dataclasses.replace(tree, copied=copied)
        likely = candidates.scores[kept]
        # Where nothing was drafted the choice stands, whatever another order of sums would round it to: what waits for
        # the drafter was given room by it.
        drafted_too = pace.best_size(plan.pace, costs, price, likely, together)
        choice = jax.tree.map(functools.partial(jnp.where, drafts), drafted_too, undrafted)

    def passed(size: int, carry: tuple[Taken, KVCache]) -> tuple[Taken, KVCache]:
        part = tree.first(size)
        verdict, cache = verify(plan, weights, carry[1], part, state, together)
        return take(plan, part, verdict, cache, state, together)

    at = Taken.nothing(plan, turn.accepted), state.caches.target
    for index, size in enumerate(plan.pace.sizes):
        at = pace.when(choice.index == index, functools.partial(passed, size), at)
    taken, cache = at
    after = emit(plan, state, tree, taken, Caches(cache, memory, state.caches.text))

    with jax.named_scope("pulse"):
        facts = pace.Facts(
            levels=levels,
            size=choice.index,
            gain=pace.gained(costs, price, levels, undrafted, choice, unknown),
            emitted=together.total(after.length - state.length),
        )
        promised = pace.promised(plan.pace, choice, likely, copied)
        proven = state.trust.after(promised, pace.came(copied, taken.path, taken.drafts))
    waiting = _waiting(turn.accepted, takes_in, after.accepted)
    return dataclasses.replace(after, accepted=waiting, pulse=pace.after(pulse, costs, facts), trust=proven)


def _waiting(before: Accepted, taken_in: Array, new: Accepted) -> Accepted:
    """What the drafter has not taken in yet: what a round brought, after what waited already."""
    first = jnp.where(taken_in, 0, before.count)

    def joined(old: Array, fresh: Array) -> Array:
        wide = jnp.concatenate([old, jnp.zeros_like(fresh)])
        return lax.dynamic_update_slice_in_dim(wide, fresh, first, 0)[: old.shape[0]]

    return Accepted(
        joined(before.features, new.features), joined(before.next_tokens, new.next_tokens), first + new.count
    )
