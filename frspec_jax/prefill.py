"""A prompt through target and drafter, in chunks of a fixed size, and the first token after it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from frspec_jax import llama, sampling
from frspec_jax.likelihood import Likelihood
from frspec_jax.mesh_parts import caches_on, state_on, weights_on
from frspec_jax.penalties import Penalties
from frspec_jax.placement import Placement
from frspec_jax.plan import EXACT, Plan
from frspec_jax.sampling import argument
from frspec_jax.sharding import WHOLE, on_mesh
from frspec_jax.state import Asked, Caches, DecodeState, Weights, state_after
from frspec_jax.tree import DraftTree


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
        logits = llama.logits(weights.target, plan.config, feature[None], plan.kernels.axis)
        adjusting = None if penalties is None else penalties.on(DraftTree.of_root(jnp.int32(0)))
        at = jnp.zeros(1, jnp.int32)
        token = sampling.choose(logits, plan.rule, asked.draw, length[None], at, adjusting=adjusting)
        return token[0], Likelihood.if_wanted(asked.likelihood, logits, token, at) if plan.logprobs else None

    def none_yet(_: Array) -> tuple[Array, Likelihood | None]:
        return jnp.int32(0), Likelihood.unknown(1) if plan.logprobs else None

    # A branch, so that the head is read once a prompt and not once a chunk.
    root, likelihood = lax.cond(chunk.last, first_token, none_yet, feature)
    text = caches.text_with(chunk.tokens[1:], chunk.start + 1)
    if text is not None:  # what follows the last token of all was not known
        text = text.at[length].set(jnp.where(chunk.last, root, text[length]))
    state = state_after(plan, Caches(target, draft, text), feature, root, length, asked)
    if penalties is not None:
        state = dataclasses.replace(state, penalties=penalties.after(root[None], chunk.last.astype(jnp.int32)))
    if likelihood is not None:
        every = Likelihood.unknown(state.output.shape[0]).written(likelihood, jnp.int32(0))
        state = dataclasses.replace(state, likelihood=every)
    return state


@functools.wraps(prefill_chunk)
def prefill_on_mesh(
    plan: Plan, weights: Weights, caches: Caches, chunk: Chunk, asked: Asked, penalties: Penalties | None = None
) -> DecodeState:
    program = functools.partial(prefill_chunk, plan)
    given = (weights_on(plan, weights), caches_on(plan, caches), WHOLE, WHOLE, WHOLE)
    return on_mesh(program, plan.mesh, given, state_on(plan, caches))(weights, caches, chunk, asked, penalties)


run = jax.jit(prefill_on_mesh, static_argnames=("plan",), compiler_options=EXACT, donate_argnames=("caches",))


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
        state = run(plan, weights, caches, part, asked, penalties)
        caches = state.caches
    return state
