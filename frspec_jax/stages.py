"""The stages of a round: draft a tree, verify it in one pass of the target, take the right path, and emit it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from frspec_jax import kv_cache, llama, sampling
from frspec_jax.drafters.base import Accepted, DraftMemory, Turn
from frspec_jax.kv_cache import KVCache
from frspec_jax.likelihood import Likelihood
from frspec_jax.placement import Placement
from frspec_jax.plan import Plan
from frspec_jax.state import COPIED, DRAFTED, FULL, OWN, RUNNING, STOPPED, Caches, DecodeState, Weights
from frspec_jax.together import ALONE, Together
from frspec_jax.tree import DraftTree, accepted_path, within_blocks
from pallas_kernels.tree_attention import seam


def turn_of(state: DecodeState) -> Turn:
    """What the drafter is told when its turn comes."""
    return Turn(state.accepted, state.root, state.length, state.caches.text)


def draft(plan: Plan, weights: Weights, state: DecodeState) -> tuple[DraftTree, DraftMemory]:
    """Steps 1 and 2, extend and propose: a tree below the root, and what the drafter remembers."""
    with jax.named_scope("draft"):
        turn = turn_of(state)
        lead, memory = plan.drafter.take_in(weights.draft, turn, state.caches.draft)
        return plan.drafter.propose(weights.draft, plan.tree, lead, turn, memory)


@struct.dataclass
class Verdict:
    """What the target says of a tree."""

    features: Array  # [N, (1 + taps) H], of each node
    chosen: Array  # [N] int32, its own next token after each node
    typical: Array | None  # [N] bool, nodes that it would also bear, where acceptance is lossy
    logits: Array | None  # [N, V] float32, its own; None where nobody asks for log-probabilities


def verify(
    plan: Plan, weights: Weights, cache: KVCache, tree: DraftTree, state: DecodeState, together: Together = ALONE
) -> tuple[Verdict, KVCache]:
    """Steps 3 and 4: what the target says of each node of a tree below the state's root, and its cache.

    cache: the state's target cache, or what has become of it since.
    """
    length, draw = state.length, state.asked.draw
    with jax.named_scope("verify"):
        features, cache = llama.forward(
            weights.target,
            plan.config,
            tree.tokens,
            Placement.of_tree(tree, length),
            cache,
            kernels=plan.kernels,
            taps=plan.drafter.taps,
        )
        if plan.kernels.axis is not None and plan.only_best:
            chosen = llama.likeliest(weights.target, plan.config, features, plan.kernels.axis)
            return Verdict(features, chosen, None, None), cache
        logits = llama.logits(weights.target, plan.config, features, plan.kernels.axis)
    adjusting = None if state.penalties is None else state.penalties.on(tree, together)
    following = length + 1 + jnp.arange(plan.tree.depth + 1, dtype=jnp.int32)
    chosen = sampling.choose(logits, plan.rule, draw, following, tree.depth, together, adjusting)
    typical = None
    if plan.rule == "typical":
        scores = logits if adjusting is None else adjusting.apply(logits)
        typical = sampling.typical(scores, draw.by, tree.tokens, tree.parent)
    return Verdict(features, chosen, typical, logits if plan.logprobs else None), cache


@struct.dataclass
class Taken:
    """The path of a tree that the target goes along, and the token that it says after it."""

    path: Array  # [D+1] int32, the nodes
    block: Array  # [D+1] int32, tokens: the accepted drafts, then the target's own; padding after that
    drafts: Array  # int32, how many were accepted
    features: Array  # [D+1, (1 + taps) H], of the nodes
    likelihood: Likelihood | None  # of the block's tokens, where the plan has log-probabilities

    @classmethod
    def nothing(cls, plan: Plan, like: Accepted) -> Taken:
        """Before a tree is verified."""
        zeros = jnp.zeros_like(like.next_tokens)
        likelihood = Likelihood.unknown(zeros.shape[0]) if plan.logprobs else None
        return cls(zeros, zeros, jnp.int32(0), jnp.zeros_like(like.features), likelihood)


def take(
    plan: Plan, tree: DraftTree, verdict: Verdict, cache: KVCache, state: DecodeState, together: Together = ALONE
) -> tuple[Taken, KVCache]:
    """Step 5: the right path, and a cache in which its K/V rows stand one after the other."""
    depth = plan.tree.depth
    path, drafts = accepted_path(tree, verdict.chosen, depth, verdict.typical)
    between = seam(cache[0].capacity, cache[0].keys.dtype, plan.kernels.steady)
    if between is not None:
        drafts = within_blocks(path, drafts, state.length, between)
    block = verdict.chosen[path]
    if verdict.typical is not None:  # then the drafts need not be what the target chose
        block = jnp.where(jnp.arange(depth + 1) < drafts, jnp.roll(tree.tokens[path], -1), block)
    if tree.tokens.shape[0] > 1:
        cache = kv_cache.compact(cache, state.length, path, plan.kernels.attention)
    likelihood = None
    if verdict.logits is not None:
        likelihood = Likelihood.if_wanted(together.any(state.asked.likelihood), verdict.logits, block, path)
    return Taken(path, block, drafts, verdict.features[path], likelihood), cache


def emit(plan: Plan, state: DecodeState, tree: DraftTree, taken: Taken, caches: Caches) -> DecodeState:
    """Step 6: write down what was taken, as far as a stop id or the limit allows."""
    depth, block, drafts = plan.tree.depth, taken.block, taken.drafts
    index = jnp.arange(depth + 1, dtype=jnp.int32)
    stops = plan.stops(block) & (index <= drafts)
    stopped = stops.any()
    count = jnp.where(stopped, jnp.argmax(stops).astype(jnp.int32), drafts) + 1
    room = state.asked.limit - state.emitted
    stopped &= count <= room
    count = jnp.minimum(count, room).astype(jnp.int32)
    emitted = state.emitted + count
    origins = state.origins
    if depth:  # else all are the target's own
        came = jnp.where(index < drafts, DRAFTED, OWN)
        if tree.copied is not None:
            came = jnp.where((index < drafts) & jnp.roll(tree.copied[taken.path], -1), COPIED, came)
        origins = lax.dynamic_update_slice(origins, came.astype(jnp.int8), (state.emitted,))
    if state.penalties is not None:
        state = dataclasses.replace(state, penalties=state.penalties.after(block, count))
    if state.likelihood is not None and taken.likelihood is not None:
        every = state.likelihood.written(taken.likelihood, state.emitted)
        state = dataclasses.replace(state, likelihood=every)
    return dataclasses.replace(
        state,
        caches=dataclasses.replace(caches, text=caches.text_with(block, state.length + 1)),
        length=state.length + count,
        root=block[count - 1],
        accepted=Accepted(taken.features, block, count),
        output=lax.dynamic_update_slice(state.output, block, (state.emitted,)),
        origins=origins,
        emitted=emitted,
        finished=jnp.where(stopped, STOPPED, jnp.where(emitted >= state.asked.limit, FULL, RUNNING)).astype(jnp.int32),
        rounds=state.rounds + 1,
        histogram=state.histogram + (index == count - 1),
    )
