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
import numpy as np
from flax import struct
from jax import Array, lax

from frspec_jax import kv_cache, llama, sampling
from frspec_jax.config import ModelConfig, Sampling, TreeConfig
from frspec_jax.drafters.base import Accepted, Drafter, DraftMemory, DraftWeights, Turn
from frspec_jax.kv_cache import KVCache
from frspec_jax.llama import LlamaParams
from frspec_jax.placement import Placement
from frspec_jax.sampling import Draw, Rule, argument
from frspec_jax.tree import DraftTree, accepted_path
from pallas_kernels.dispatch import AUTO, Kernels
from pallas_kernels.tree_attention import attention_rows

RUNNING, STOPPED, FULL = 0, 1, 2  # DecodeState.finished

# XLA may otherwise leave out the rounding of a sum to bfloat16 and back, in one program and not in another, and
# a tree's pass and a single token's would part. In float32 this changes nothing. (JAX takes such options at the
# outermost jit alone: a program of one's own is built from `decode_rounds`.)
EXACT = {"xla_allow_excess_precision": False}


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static: the same plan is the same compiled program, whatever the prompt and the request's figures."""

    config: ModelConfig
    drafter: Drafter
    tree: TreeConfig
    stop_ids: tuple[int, ...] = ()
    rule: Rule = "greedy"
    kernels: Kernels = AUTO  # the target's; a drafter carries its own

    def within(self, rows: int) -> Plan:
        """The same for as long as a text fits `rows` rows of the caches."""
        kernels = dataclasses.replace(self.kernels, rows=rows)
        return dataclasses.replace(self, kernels=kernels, drafter=self.drafter.within(rows))

    @property
    def margin(self) -> int:
        """Cache rows that a round may write beyond the committed ones."""
        return max(self.tree.size, self.tree.draft_rows, self.tree.depth + 1)


@struct.dataclass
class Weights:
    """The arrays that a round reads and never writes."""

    target: LlamaParams
    draft: DraftWeights


@struct.dataclass
class Caches:
    """The cache of the target and the memory of the drafter; they outlive a request, and need no clearing."""

    target: KVCache
    draft: DraftMemory

    @property
    def capacity(self) -> int:
        """S, the rows of each layer's cache."""
        return self.target[0].capacity


@struct.dataclass
class Asked:
    """What a request asks for. All of it is arrays: another temperature, seed or limit compiles nothing."""

    draw: Draw  # temperature and filters, seed and sequence number
    limit: Array  # int32, emit no more than this

    @classmethod
    def of(cls, sampling: Sampling, *, seed: int, limit: int, sequence: int = 0) -> Asked:
        return cls(Draw.of(sampling, seed, sequence), argument(limit, np.int32))


@struct.dataclass
class DecodeState:
    """One sequence being decoded."""

    caches: Caches
    length: Array  # int32, n: tokens in the target's cache
    root: Array  # int32, the last emitted token; it stands at position n and is not in the cache yet
    accepted: Accepted  # what the drafter has not taken in yet
    output: Array  # [S + D + 1] int32, the emitted tokens; `emitted` of them are real
    emitted: Array  # int32
    finished: Array  # int32: RUNNING, STOPPED by a stop id, or FULL (the limit is reached)
    rounds: Array  # int32
    histogram: Array  # [D+1] int32, rounds by the number of drafts that they emitted (0 to D)
    asked: Asked


def new_caches(plan: Plan, capacity: int, dtype: jnp.dtype) -> Caches:
    """Caches for `capacity` positions (a multiple of `kv_cache.BLOCK`)."""
    return Caches(kv_cache.empty(plan.config, capacity, dtype), plan.drafter.new_memory(capacity, dtype))


# Prefill -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How many tokens of a prompt run in one pass: long chunks while there are enough tokens, short ones for the rest.

    A long chunk reads the weights once for more tokens; a short prompt would mostly pad it. Each size is a program.
    """

    short: int  # divides `kv_cache.BLOCK`, so that a padded last one stays within the capacity
    long: int = 0  # 0: none

    def sizes(self, length: int, capacity: int) -> list[int]:
        """The chunks of a prompt of `length` tokens, in order.

        A long one costs about what short ones for two thirds of its tokens do (docs/how.md): from there on it pays,
        padded or not, if the cache holds it.
        """
        sizes: list[int] = []
        while (left := length - sum(sizes)) > 0:
            long = 0 < 2 * self.long < 3 * left and sum(sizes) + self.long <= capacity
            sizes.append(self.long if long else self.short)
        return sizes


@struct.dataclass
class Chunk:
    """A part of a prompt, padded to the chunk size C."""

    tokens: Array  # [C + 1] int32: one more, since a draft pairs each token with the next
    start: Array  # int32, the position of the first
    count: Array  # int32, how many of the first C are real
    last: Array  # bool, whether the prompt ends here


@functools.partial(jax.jit, static_argnames=("plan",), compiler_options=EXACT, donate_argnames=("caches",))
def prefill(plan: Plan, weights: Weights, caches: Caches, chunk: Chunk, asked: Asked) -> DecodeState:
    """Run a chunk through target and drafter. The state after the last one has the first token; others have no root."""
    size = chunk.tokens.shape[0] - 1
    with jax.named_scope("prefill"):
        features, target = llama.forward(
            weights.target,
            plan.config,
            chunk.tokens[:-1],
            Placement.chain(chunk.start, size),
            caches.target,
            kernels=plan.kernels.for_prompts(),
            taps=plan.drafter.taps,
        )
        draft = plan.drafter.prefill(weights.draft, features, chunk.tokens[1:], chunk.start, caches.draft)
    feature, length = features[chunk.count - 1], chunk.start + chunk.count

    def first_token(feature: Array) -> Array:
        scores = llama.logits(weights.target, feature[None])
        return sampling.choose(scores, plan.rule, asked.draw, length[None], jnp.zeros(1, jnp.int32))[0]

    # A branch, so that the head is read once a prompt and not once a chunk.
    root = lax.cond(chunk.last, first_token, lambda _: jnp.int32(0), feature)
    return state_after(plan, Caches(target, draft), feature, root, length, asked)


def state_after(plan: Plan, caches: Caches, feature: Array, root: Array, length: Array, asked: Asked) -> DecodeState:
    """The state after `length` tokens: `feature` [H] is the last one's, and `root` the token chosen from it."""
    depth = plan.tree.depth
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
        output=jnp.zeros(caches.capacity + depth + 1, jnp.int32).at[0].set(root),
        emitted=jnp.int32(1),
        finished=jnp.where(stopped, STOPPED, jnp.where(asked.limit <= 1, FULL, RUNNING)).astype(jnp.int32),
        rounds=jnp.int32(0),
        histogram=jnp.zeros(depth + 1, jnp.int32),
        asked=asked,
    )


def start(
    plan: Plan, weights: Weights, caches: Caches, prompt: np.ndarray, asked: Asked, *, chunks: Chunks
) -> DecodeState:
    """Run a prompt, a chunk a pass, and choose the first token.

    Args:
      caches: donated. prompt: [T] int32, at least one token.
      asked: the caller sees to it that T + limit + plan.margin fit the capacity.
    """
    length, first = len(prompt), 0
    sizes = chunks.sizes(length, caches.capacity)
    padded = np.zeros(sum(sizes) + 1, np.int32)
    padded[:length] = prompt
    for size in sizes:
        part = Chunk(
            tokens=argument(padded[first : first + size + 1], np.int32),
            start=argument(first, np.int32),
            count=argument(min(size, length - first), np.int32),
            last=argument(first + size >= length, np.bool_),
        )
        state = prefill(plan, weights, caches, part, asked)
        caches, first = state.caches, first + size
    return state


# The round ---------------------------------------------------------------------------------------


def draft(plan: Plan, weights: Weights, state: DecodeState) -> tuple[DraftTree, DraftMemory]:
    """Steps 1 and 2, extend and propose: a tree below the root, and what the drafter remembers."""
    with jax.named_scope("draft"):
        turn = Turn(state.accepted, state.root, state.length)
        return plan.drafter.propose(weights.draft, plan.tree, turn, state.caches.draft)


@struct.dataclass
class Verdict:
    """What the target says of a tree."""

    features: Array  # [N, (1 + taps) H], of each node
    chosen: Array  # [N] int32, its own next token after each node
    typical: Array | None  # [N] bool, nodes that it would also bear, where acceptance is lossy


def verify(plan: Plan, weights: Weights, state: DecodeState, tree: DraftTree) -> tuple[Verdict, KVCache]:
    """Steps 3 and 4: what the target says of each node, and its cache."""
    with jax.named_scope("verify"):
        features, cache = llama.forward(
            weights.target,
            plan.config,
            tree.tokens,
            Placement.of_tree(tree, state.length),
            state.caches.target,
            kernels=plan.kernels,
            taps=plan.drafter.taps,
        )
        scores = llama.logits(weights.target, features)
    draw = state.asked.draw
    following = state.length + 1 + jnp.arange(plan.tree.depth + 1, dtype=jnp.int32)
    chosen = sampling.choose(scores, plan.rule, draw, following, tree.depth)
    lossy = plan.rule == "typical"
    typical = sampling.typical(scores, draw.by, tree.tokens, tree.parent) if lossy else None
    return Verdict(features, chosen, typical), cache


def accept(plan: Plan, state: DecodeState, tree: DraftTree, verdict: Verdict, caches: Caches) -> DecodeState:
    """Steps 5 and 6: emit the right path and one token more, and commit its K/V rows."""
    depth = plan.tree.depth
    path, drafts = accepted_path(tree, verdict.chosen, depth, verdict.typical)
    index = jnp.arange(depth + 1, dtype=jnp.int32)
    block = verdict.chosen[path]  # [D+1]: the accepted drafts, then the bonus token; padding past drafts + 1
    if verdict.typical is not None:  # then the drafts need not be what the target chose
        block = jnp.where(index < drafts, jnp.roll(tree.tokens[path], -1), block)
    stops = jnp.isin(block, jnp.array(plan.stop_ids, jnp.int32)) & (index <= drafts)
    stopped = stops.any()
    count = jnp.where(stopped, jnp.argmax(stops).astype(jnp.int32), drafts) + 1
    room = state.asked.limit - state.emitted
    stopped &= count <= room
    count = jnp.minimum(count, room).astype(jnp.int32)
    emitted = state.emitted + count
    return dataclasses.replace(
        state,
        caches=dataclasses.replace(
            caches, target=kv_cache.compact(caches.target, state.length, path, plan.kernels.attention)
        ),
        length=state.length + count,
        root=block[count - 1],
        accepted=Accepted(verdict.features[path], block, count),
        output=lax.dynamic_update_slice(state.output, block, (state.emitted,)),
        emitted=emitted,
        finished=jnp.where(stopped, STOPPED, jnp.where(emitted >= state.asked.limit, FULL, RUNNING)).astype(jnp.int32),
        rounds=state.rounds + 1,
        histogram=state.histogram + (index == count - 1),
    )


def decode_round(plan: Plan, weights: Weights, state: DecodeState) -> DecodeState:
    """One round: draft, verify, accept."""
    tree, memory = draft(plan, weights, state)
    verdict, cache = verify(plan, weights, state, tree)
    return accept(plan, state, tree, verdict, Caches(cache, memory))


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

run = jax.jit(decode_rounds, static_argnames=("plan",), donate_argnames=("state",), compiler_options=EXACT)
