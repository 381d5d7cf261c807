"""The decode loop: one compiled round, and the loop of rounds that generation and streaming share.

A round drafts a tree, verifies it in one pass of the target, and emits the longest path that the
target itself would have taken, and one token more. Vanilla decoding is the same round with a tree of
one node; greedy decoding is the same choice with no noise.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from frspec_jax import kv_cache, llama, sampling
from frspec_jax.config import ModelConfig, Sampling, TreeConfig
from frspec_jax.drafters.base import Accepted, Drafter
from frspec_jax.kv_cache import KVCache
from frspec_jax.llama import LlamaParams
from frspec_jax.tree import DraftTree, accepted_path
from pallas_kernels.dispatch import AUTO, Kernels
from pallas_kernels.visibility import causal

RUNNING, STOPPED, FULL = 0, 1, 2  # DecodeState.finished

# XLA may otherwise leave out the rounding of a sum to bfloat16 and back, in one program and not in another, and
# a tree's pass and a single token's would part. In float32 this changes nothing. (JAX takes such options at the
# outermost jit alone: a program of one's own is built from `decode_rounds`.)
EXACT = {"xla_allow_excess_precision": False}


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static: the same plan is the same compiled program, whatever the prompt."""

    config: ModelConfig
    drafter: Drafter
    tree: TreeConfig
    sampling: Sampling
    stop_ids: tuple[int, ...]
    kernels: Kernels = AUTO  # the target's; a drafter carries its own

    @property
    def margin(self) -> int:
        """Cache rows that a round may write beyond the committed ones."""
        return max(self.tree.size, self.tree.draft_rows, self.tree.depth + 1)


@struct.dataclass
class Weights:
    """The arrays that a round reads and never writes."""

    target: LlamaParams
    draft: Any  # the drafter's


@struct.dataclass
class Caches:
    """The caches of the target and of the drafter; they outlive a request, and need no clearing."""

    target: KVCache
    draft: Any


@struct.dataclass
class DecodeState:
    """One sequence being decoded."""

    caches: Caches
    length: Array  # int32, n: tokens in the target's cache
    root: Array  # int32, the last emitted token; it stands at position n and is not in the cache yet
    accepted: Accepted  # what the drafter has not taken in yet
    output: Array  # [S + D + 1] int32, the emitted tokens; `emitted` of them are real
    emitted: Array  # int32
    limit: Array  # int32, emit no more than this
    finished: Array  # int32: RUNNING, STOPPED by a stop id, or FULL (the limit is reached)
    seed: Array  # int32
    sequence: Array  # int32, tells apart the members of a batch in the sampling noise
    rounds: Array  # int32
    histogram: Array  # [D+1] int32, rounds by the number of drafts that they emitted (0 to D)


def new_caches(plan: Plan, capacity: int, dtype: jnp.dtype) -> Caches:
    """Caches for `capacity` positions (a multiple of `kv_cache.BLOCK`)."""
    return Caches(kv_cache.empty(plan.config, capacity, dtype), plan.drafter.new_cache(capacity, dtype))


# Prefill -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("plan",), compiler_options=EXACT, donate_argnames=("caches",))
def _prefill_chunk(
    plan: Plan, weights: Weights, caches: Caches, tokens: Array, start: Array, count: Array
) -> tuple[Caches, Array]:
    """Run tokens [C + 1], `count` of the first C real, through target and drafter; the last real one's feature [H]."""
    chunk = tokens.shape[0] - 1
    positions = start + jnp.arange(chunk, dtype=jnp.int32)
    with jax.named_scope("prefill"):
        features, target = llama.forward(
            weights.target, plan.config, tokens[:-1], positions, caches.target, start, causal(chunk),
            plan.kernels.for_prompts(), plan.drafter.taps,
        )  # fmt: skip
        draft = plan.drafter.prefill(weights.draft, weights.target.embedding, features, tokens[1:], start, caches.draft)
    return Caches(target, draft), features[count - 1]


@functools.partial(jax.jit, static_argnames=("plan",), compiler_options=EXACT, donate_argnames=("caches",))
def _first_token(
    plan: Plan,
    weights: Weights,
    caches: Caches,
    feature: Array,
    length: Array,
    limit: Array,
    seed: Array,
    sequence: Array,
) -> DecodeState:
    """The state after a prompt of `length` tokens, whose last feature [H] gives the first token."""
    scores = llama.logits(weights.target, feature[None])
    root = sampling.choose(scores, plan.sampling, seed, sequence, length[None], jnp.zeros(1, jnp.int32))[0]
    return state_after(plan, caches, feature, root, length, limit, seed, sequence)


def state_after(
    plan: Plan,
    caches: Caches,
    feature: Array,
    root: Array,
    length: Array,
    limit: Array,
    seed: Array | int = 0,
    sequence: Array | int = 0,
) -> DecodeState:
    """The state after `length` tokens: `feature` [H] is the last one's, and `root` the token chosen from it."""
    depth, capacity = plan.tree.depth, caches.target[0].capacity
    stopped = jnp.isin(root, jnp.array(plan.stop_ids, jnp.int32))
    return DecodeState(
        caches=caches,
        length=length,
        root=root,
        accepted=Accepted(
            features=jnp.zeros((depth + 1, *feature.shape), feature.dtype).at[0].set(feature),
            next_tokens=jnp.zeros(depth + 1, jnp.int32).at[0].set(root),
            count=jnp.int32(1),
        ),
        output=jnp.zeros(capacity + depth + 1, jnp.int32).at[0].set(root),
        emitted=jnp.int32(1),
        limit=limit,
        finished=jnp.where(stopped, STOPPED, jnp.where(limit <= 1, FULL, RUNNING)).astype(jnp.int32),
        seed=jnp.int32(seed),
        sequence=jnp.int32(sequence),
        rounds=jnp.int32(0),
        histogram=jnp.zeros(depth + 1, jnp.int32),
    )


def start(
    plan: Plan,
    weights: Weights,
    caches: Caches,
    prompt: np.ndarray,
    *,
    chunk: int,
    limit: int,
    seed: int = 0,
    sequence: int = 0,
) -> DecodeState:
    """Run a prompt, `chunk` tokens a pass, and choose the first token.

    Args:
      caches: donated. prompt: [T] int32, at least one token.
      chunk: divides `kv_cache.BLOCK`, so that a padded last chunk stays within the capacity.
      limit: tokens to emit at most; the caller sees to it that T + limit + plan.margin fit the capacity.
    """
    length = len(prompt)
    padded = np.zeros(-(-length // chunk) * chunk + 1, np.int32)
    padded[:length] = prompt
    for first in range(0, length, chunk):
        tokens, count = padded[first : first + chunk + 1], min(chunk, length - first)
        caches, feature = _prefill_chunk(plan, weights, caches, tokens, np.int32(first), np.int32(count))
    return _first_token(
        plan, weights, caches, feature, np.int32(length), np.int32(limit), np.int32(seed), np.int32(sequence)
    )


# The round ---------------------------------------------------------------------------------------


def draft(plan: Plan, weights: Weights, state: DecodeState) -> tuple[DraftTree, Any]:
    """Steps 1 and 2, extend and propose: a tree below the root, and the drafter's cache."""
    with jax.named_scope("draft"):
        return plan.drafter.propose(
            weights.draft,
            weights.target.embedding,
            plan.tree,
            state.accepted,
            state.root,
            state.length,
            state.caches.draft,
        )


@struct.dataclass
class Verdict:
    """What the target says of a tree."""

    chosen: Array  # [N] int32, its own next token after each node
    typical: Array | None  # [N] bool, nodes that it would also bear, where acceptance is lossy


def verify(plan: Plan, weights: Weights, state: DecodeState, tree: DraftTree) -> tuple[Array, Verdict, KVCache]:
    """Steps 3 and 4: the target's features [N, H] of each node, what it says of them, and its cache."""
    with jax.named_scope("verify"):
        positions = state.length + tree.depth
        features, cache = llama.forward(
            weights.target, plan.config, tree.tokens, positions, state.caches.target, state.length, tree.ancestors,
            plan.kernels, plan.drafter.taps,
        )  # fmt: skip
        scores = llama.logits(weights.target, features)
    following = state.length + 1 + jnp.arange(plan.tree.depth + 1, dtype=jnp.int32)
    chosen = sampling.choose(scores, plan.sampling, state.seed, state.sequence, following, tree.depth)
    typical = sampling.typical(scores, plan.sampling, tree.tokens, tree.parent) if plan.sampling.typical else None
    return features, Verdict(chosen, typical), cache


def accept(
    plan: Plan, state: DecodeState, tree: DraftTree, features: Array, verdict: Verdict, caches: Caches
) -> DecodeState:
    """Steps 5 and 6: emit the right path and one token more, and commit its K/V rows."""
    depth = plan.tree.depth
    path, drafts = accepted_path(tree, verdict.chosen, depth, verdict.typical)
    index = jnp.arange(depth + 1)
    block = verdict.chosen[path]  # [D+1]: the accepted drafts, then the bonus token; padding past drafts + 1
    if verdict.typical is not None:  # then the drafts need not be what the target chose
        block = jnp.where(index < drafts, jnp.roll(tree.tokens[path], -1), block)
    stops = jnp.isin(block, jnp.array(plan.stop_ids, jnp.int32)) & (index <= drafts)
    stopped = stops.any()
    count = jnp.where(stopped, jnp.argmax(stops), drafts) + 1
    room = state.limit - state.emitted
    stopped &= count <= room
    count = jnp.minimum(count, room).astype(jnp.int32)
    emitted = state.emitted + count
    return dataclasses.replace(
        state,
        caches=dataclasses.replace(caches, target=kv_cache.compact(caches.target, state.length, path)),
        length=state.length + count,
        root=block[count - 1],
        accepted=Accepted(features[path], block, count),
        output=lax.dynamic_update_slice(state.output, block, (state.emitted,)),
        emitted=emitted,
        finished=jnp.where(stopped, STOPPED, jnp.where(emitted >= state.limit, FULL, RUNNING)).astype(jnp.int32),
        rounds=state.rounds + 1,
        histogram=state.histogram.at[count - 1].add(1),
    )


def decode_round(plan: Plan, weights: Weights, state: DecodeState) -> DecodeState:
    """One round: draft, verify, accept."""
    tree, draft_cache = draft(plan, weights, state)
    features, verdict, target_cache = verify(plan, weights, state, tree)
    return accept(plan, state, tree, features, verdict, Caches(target_cache, draft_cache))


def decode_rounds(plan: Plan, weights: Weights, state: DecodeState, rounds: Array) -> DecodeState:
    """Decode until the sequence is finished, or `rounds` more rounds are done: 1 streams, many generate."""
    last = state.rounds + rounds
    return lax.while_loop(
        lambda s: (s.finished == RUNNING) & (s.rounds < last),
        lambda s: decode_round(plan, weights, s),
        state,
    )


run = jax.jit(decode_rounds, static_argnames=("plan",), donate_argnames=("state",), compiler_options=EXACT)
