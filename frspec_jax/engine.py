"""The decode loop: one compiled round, and the loop of rounds that generation and streaming share.

A round drafts a tree, verifies it in one pass of the target, and emits the longest path that the
target itself would have taken, and one token more. Vanilla decoding is the same round with a tree of
one node; greedy decoding is the same choice with no noise.
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
from jax.sharding import Mesh

from frspec_jax import kv_cache, llama, lookup, pace, penalties, sampling
from frspec_jax.config import ModelConfig, Sampling, TreeConfig
from frspec_jax.drafters.base import Accepted, Drafter, DraftMemory, DraftWeights, Turn
from frspec_jax.kv_cache import KVCache, LayerKV
from frspec_jax.likelihood import Likelihood
from frspec_jax.llama import LlamaParams
from frspec_jax.pace import Growing, Pace, PaceTables, Pulse, Trust
from frspec_jax.penalties import Penalties
from frspec_jax.placement import Placement
from frspec_jax.sampling import Draw, Rule, argument
from frspec_jax.sharding import AXIS, COLUMNS, ROWS, WHOLE, Split, on_devices, on_mesh, weight_specs
from frspec_jax.together import ALONE, Together
from frspec_jax.tree import Candidates, DraftTree, accepted_path, best_first
from pallas_kernels.dispatch import AUTO, Kernels
from pallas_kernels.tree_attention import attention_rows

RUNNING, STOPPED, FULL = 0, 1, 2  # DecodeState.finished
OWN, DRAFTED, COPIED = 0, 1, 2  # DecodeState.origins: the target's own tokens, and accepted drafts

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
    pace: Pace | None = None  # how rounds may differ; None: each verifies the whole tree that the drafter proposes
    adjusts: bool = False  # whether penalties and biases are looked at
    logprobs: bool = False  # whether log-probabilities of what is emitted are kept
    keeps: bool = True  # whether the state keeps the whole answer, and not only what the last round emitted
    mesh: Mesh | None = None  # over whose devices the target is divided (`sharding`); None: one device has all of it

    def __post_init__(self) -> None:
        assert self.kernels.axis == (None if self.mesh is None else AXIS), "the target's layers go by the mesh"

    @property
    def reads_text(self) -> bool:
        """Whether something looks at the text so far."""
        return self.drafter.reads_text or (self.pace is not None and self.pace.lookup)

    def within(self, rows: int) -> Plan:
        """The same for as long as a text fits `rows` rows of the caches."""
        kernels = dataclasses.replace(self.kernels, rows=rows)
        return dataclasses.replace(self, kernels=kernels, drafter=self.drafter.within(rows))

    @property
    def only_best(self) -> bool:
        """Whether nothing is asked of the target's logits but which is the largest."""
        return self.rule == "greedy" and not self.adjusts and not self.logprobs

    @property
    def margin(self) -> int:
        """Cache rows that a round may write beyond the committed ones."""
        growth = self.tree if self.pace is None else self.pace.growth
        return max(self.tree.size, growth.draft_rows, self.tree.depth + 1)


@struct.dataclass
class Weights:
    """The arrays that a round reads and never writes."""

    target: LlamaParams
    draft: DraftWeights
    pace: PaceTables | None = None  # where the plan has a pace


@struct.dataclass
class Caches:
    """What is known of the tokens so far. It outlives a request, and needs no clearing."""

    target: KVCache
    draft: DraftMemory
    text: Array | None = None  # [S + 1] int32, the tokens from position 1 on; None where nobody reads it

    @property
    def capacity(self) -> int:
        """S, the rows of each layer's cache."""
        return self.target[0].capacity


@struct.dataclass
class Asked:
    """What a request asks for. All of it is arrays: another temperature, seed or limit compiles nothing."""

    draw: Draw  # temperature and filters, seed and sequence number
    limit: Array  # int32, emit no more than this
    likelihood: Array  # bool, whether log-probabilities are wanted; read where the plan has them

    @classmethod
    def of(cls, sampling: Sampling, *, seed: int, limit: int, sequence: int = 0, likelihood: bool = False) -> Asked:
        draw = Draw.of(sampling, seed, sequence)
        return cls(draw, argument(limit, np.int32), argument(likelihood, np.bool_))


@struct.dataclass
class DecodeState:
    """One sequence being decoded."""

    caches: Caches
    length: Array  # int32, n: tokens in the target's cache
    root: Array  # int32, the last emitted token; it stands at position n and is not in the cache yet
    accepted: Accepted  # what the drafter has not taken in yet
    # [S + D + 1] int32, the emitted tokens, of which `emitted` are real; or where the plan does not keep them [D + 1],
    # those of the last round.
    output: Array
    emitted: Array  # int32
    finished: Array  # int32: RUNNING, STOPPED by a stop id, or FULL (the limit is reached)
    rounds: Array  # int32
    histogram: Array  # [D+1] int32, rounds by the number of drafts that they emitted (0 to D)
    origins: Array  # as `output`, int8: how each token came, OWN, DRAFTED or COPIED
    pulse: Pulse  # what the next round's pace goes by
    trust: Trust  # and how far it believes this text's drafts
    asked: Asked
    penalties: Penalties | None = None  # where the plan adjusts
    likelihood: Likelihood | None = None  # of the emitted tokens, as `output`; where the plan has log-probabilities


def new_caches(plan: Plan, capacity: int, dtype: jnp.dtype) -> Caches:
    """Caches for `capacity` positions (a multiple of `kv_cache.BLOCK`)."""
    text = jnp.full(capacity + 1, -1, jnp.int32) if plan.reads_text else None
    kv_heads = None
    if plan.mesh is not None:
        split = Split(plan.config, plan.mesh.devices.size)
        kv_heads = split.kv_heads * split.count
    target = kv_cache.empty(plan.config, capacity, dtype, kv_heads)
    return Caches(target, plan.drafter.new_memory(capacity, dtype), text)


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


def prefill_chunk(
    plan: Plan, weights: Weights, caches: Caches, chunk: Chunk, asked: Asked, penalties: Penalties | None = None
) -> DecodeState:
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
        draft = plan.drafter.prefill(weights.draft, features, chunk.tokens, chunk.start, chunk.count, caches.draft)
    feature, length = features[chunk.count - 1], chunk.start + chunk.count

    def first_token(feature: Array) -> tuple[Array, Likelihood | None]:
        if plan.kernels.axis is not None and plan.only_best:
            return llama.likeliest(weights.target, plan.config, feature[None], plan.kernels.axis)[0], None
        logits = scores = llama.logits(weights.target, plan.config, feature[None], plan.kernels.axis)
        if penalties is not None:
            scores = adjusted(logits, penalties, DraftTree.of_root(jnp.int32(0)))
        token = sampling.choose(scores, plan.rule, asked.draw, length[None], jnp.zeros(1, jnp.int32))
        at = jnp.zeros(1, jnp.int32)
        return token[0], likelihood_if(asked.likelihood, logits, token, at) if plan.logprobs else None

    def none_yet(_: Array) -> tuple[Array, Likelihood | None]:
        return jnp.int32(0), Likelihood.unknown(1) if plan.logprobs else None

    # A branch, so that the head is read once a prompt and not once a chunk.
    root, likelihood = lax.cond(chunk.last, first_token, none_yet, feature)
    text = _noted(caches.text, chunk.tokens[1:], chunk.start + 1)
    if text is not None:  # what follows the last token of all was not known
        text = text.at[length].set(jnp.where(chunk.last, root, text[length]))
    state = state_after(plan, Caches(target, draft, text), feature, root, length, asked)
    if penalties is not None:
        state = dataclasses.replace(state, penalties=penalties.after(root[None], chunk.last.astype(jnp.int32)))
    if likelihood is not None:
        every = Likelihood.unknown(state.output.shape[0]).written(likelihood, jnp.int32(0))
        state = dataclasses.replace(state, likelihood=every)
    return state


def weights_on(weights: Weights) -> Weights:
    """Where the parts of the weights stand on a mesh: the target's are divided, and each device has all others."""
    return Weights(weight_specs(weights.target), WHOLE, WHOLE)  # type: ignore[arg-type]


def caches_on(caches: Caches) -> Caches:
    """Where the parts of caches stand on a mesh: the target's keys and values are divided by heads."""

    def layer(kv: LayerKV) -> LayerKV:
        spec = ROWS if kv.slot is None and kv.keys.ndim == 3 else COLUMNS  # of a pool heads are the second axis
        return LayerKV(spec, spec, WHOLE)  # type: ignore[arg-type]

    return Caches(tuple(map(layer, caches.target)), WHOLE, WHOLE)  # type: ignore[arg-type]


def state_on(caches: Caches) -> DecodeState:
    """Where the parts of a state with such caches stand on a mesh."""
    parts: dict[str, Any] = {field.name: WHOLE for field in dataclasses.fields(DecodeState)}
    return DecodeState(**(parts | {"caches": caches_on(caches)}))


T = TypeVar("T")


def made(plan: Plan, make: Callable[[], T], where: Callable[[T], Any]) -> T:
    """Arrays made where the results of this plan's programs stand: for others its programs would be compiled once more.

    On a mesh each device makes its own part. where: says of them where their parts stand there.
    """
    if plan.mesh is None:
        return jax.device_put(make(), jax.local_devices()[0])
    shapes = jax.eval_shape(make)
    return jax.jit(make, out_shardings=on_devices(plan.mesh, shapes, where(shapes)))()


@functools.wraps(prefill_chunk)
def prefill_on_mesh(
    plan: Plan, weights: Weights, caches: Caches, chunk: Chunk, asked: Asked, penalties: Penalties | None = None
) -> DecodeState:
    program = functools.partial(prefill_chunk, plan)
    given = (weights_on(weights), caches_on(caches), WHOLE, WHOLE, WHOLE)
    return on_mesh(program, plan.mesh, given, state_on(caches))(weights, caches, chunk, asked, penalties)


prefill = jax.jit(prefill_on_mesh, static_argnames=("plan",), compiler_options=EXACT, donate_argnames=("caches",))


def adjusted(logits: Array, by: Penalties, tree: DraftTree, together: Together = ALONE) -> Array:
    """Penalised logits [N, V], where the request asks for it; looked at only if some text's does."""

    def each(logits: Array) -> Array:
        return jnp.where(by.active, penalties.adjusted(logits, by, tree), logits)

    return lax.cond(together.any(by.active), each, lambda logits: logits, logits)


def likelihood_if(wanted: Array, logits: Array, tokens: Array, rows: Array) -> Likelihood:
    """Of tokens [T] chosen from the rows [T] of logits [N, V], if `wanted` [] bool: else not a row is looked at."""
    unknown = Likelihood.unknown(tokens.shape[0])
    return lax.cond(wanted, lambda logits: Likelihood.of(logits[rows], tokens), lambda _: unknown, logits)


def _noted(text: Array | None, tokens: Array, position: Array) -> Array | None:
    """The text with `tokens` [T] from a position on; what is no token of it yet is written over later."""
    return None if text is None else lax.dynamic_update_slice(text, tokens, (position,))


def state_after(plan: Plan, caches: Caches, feature: Array, root: Array, length: Array, asked: Asked) -> DecodeState:
    """The state after `length` tokens: `feature` [H] is the last one's, and `root` the token chosen from it."""
    depth = plan.tree.depth
    room = depth + 1 + (caches.capacity if plan.keeps else 0)
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
        output=jnp.zeros(room, jnp.int32).at[0].set(root),
        emitted=jnp.int32(1),
        finished=jnp.where(stopped, STOPPED, jnp.where(asked.limit <= 1, FULL, RUNNING)).astype(jnp.int32),
        rounds=jnp.int32(0),
        histogram=jnp.zeros(depth + 1, jnp.int32),
        origins=jnp.zeros(room, jnp.int8),
        pulse=Pulse.still(),
        trust=Trust.unproven(),
        asked=asked,
    )


def start(
    plan: Plan,
    weights: Weights,
    caches: Caches,
    prompt: np.ndarray,
    asked: Asked,
    *,
    chunks: Chunks,
    penalties: Penalties | None = None,
) -> DecodeState:
    """Run a prompt, a chunk a pass, and choose the first token.

    Args:
      caches: donated. prompt: [T] int32, at least one token.
      asked: the caller sees to it that T + limit + plan.margin fit the capacity.
      penalties: where the plan adjusts.
    """
    for part in parts_of(prompt, chunks, caches.capacity):
        state = prefill(plan, weights, caches, part, asked, penalties)
        caches = state.caches
    return state


def parts_of(prompt: np.ndarray, chunks: Chunks, capacity: int, first: int = 0) -> list[Chunk]:
    """A prompt [T] in chunks, of which the tokens before `first`, a multiple of the short chunk, are read already."""
    length, parts = len(prompt), []
    sizes = chunks.sizes(length - first, capacity - first)
    padded = np.zeros(first + sum(sizes) + 1, np.int32)
    padded[:length] = prompt
    for size in sizes:
        part = Chunk(
            tokens=argument(padded[first : first + size + 1], np.int32),
            start=argument(first, np.int32),
            count=argument(min(size, length - first), np.int32),
            last=argument(first + size >= length, np.bool_),
        )
        parts.append(part)
        first += size
    return parts


# The round ---------------------------------------------------------------------------------------


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
        logits = scores = llama.logits(weights.target, plan.config, features, plan.kernels.axis)
    if state.penalties is not None:
        scores = adjusted(logits, state.penalties, tree, together)
    following = length + 1 + jnp.arange(plan.tree.depth + 1, dtype=jnp.int32)
    chosen = sampling.choose(scores, plan.rule, draw, following, tree.depth, together)
    lossy = plan.rule == "typical"
    typical = sampling.typical(scores, draw.by, tree.tokens, tree.parent) if lossy else None
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
    block = verdict.chosen[path]
    if verdict.typical is not None:  # then the drafts need not be what the target chose
        block = jnp.where(jnp.arange(depth + 1) < drafts, jnp.roll(tree.tokens[path], -1), block)
    if tree.tokens.shape[0] > 1:
        cache = kv_cache.compact(cache, state.length, path, plan.kernels.attention)
    likelihood = None
    if verdict.logits is not None:
        likelihood = likelihood_if(together.any(state.asked.likelihood), verdict.logits, block, path)
    return Taken(path, block, drafts, verdict.features[path], likelihood), cache


def emit(plan: Plan, state: DecodeState, tree: DraftTree, taken: Taken, caches: Caches) -> DecodeState:
    """Step 6: write down what was taken, as far as a stop id or the limit allows."""
    depth, block, drafts = plan.tree.depth, taken.block, taken.drafts
    index = jnp.arange(depth + 1, dtype=jnp.int32)
    stops = jnp.isin(block, jnp.array(plan.stop_ids, jnp.int32)) & (index <= drafts)
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
        caches=dataclasses.replace(caches, text=_noted(caches.text, block, state.length + 1)),
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
def _rounds_on_mesh(plan: Plan, weights: Weights, state: DecodeState, rounds: Array) -> DecodeState:
    program, where = functools.partial(decode_rounds, plan), state_on(state.caches)
    return on_mesh(program, plan.mesh, (weights_on(weights), where, WHOLE), where)(weights, state, rounds)


run = jax.jit(_rounds_on_mesh, static_argnames=("plan",), donate_argnames=("state",), compiler_options=EXACT)
