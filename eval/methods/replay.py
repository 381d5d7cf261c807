"""Answers replayed: what each drafting method would have accepted of a text that is known, without its target.

Greedy text is the same whatever drafts, so one answer of vanilla's serves all methods. The target reads it once; then
each method drafts from its features, as in a round, and a draft is accepted where the text goes on with it. Accepted
lengths are those of decoding (tests/eval/test_replay.py), and cost the drafting alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from frspec_jax import engine, kv_cache, llama
from frspec_jax.api import Generator, Request, Result
from frspec_jax.drafters.base import Accepted, DraftMemory, DraftWeights, Turn
from frspec_jax.kv_cache import KVCache
from frspec_jax.llama import LlamaParams
from frspec_jax.placement import Placement
from frspec_jax.tree import accepted_path

PASS = kv_cache.BLOCK  # tokens of a text that run at once


def answers(
    vanilla: Generator, models: dict[str, Generator], prompt: np.ndarray, request: Request
) -> dict[str, Result]:
    """What drafting methods make of vanilla's greedy answer to a prompt of ids [T]; their times are vanilla's.

    models: each with a fixed pace.
    """
    answer = vanilla.generate_ids(prompt, request)
    text, features, replayed = [*prompt.tolist(), *answer.tokens], {}, {}
    with jax.enable_x64(False):
        for name, model in models.items():
            taps = model.plan().drafter.taps
            if taps not in features:
                features[taps] = _features(model, text)
            counts = histogram(model, text, len(prompt), features[taps])
            rounds = int(counts.sum())
            replayed[name] = dataclasses.replace(
                answer,
                method=model.drafting.method.name,
                draft_vocab=model.draft_vocab,
                context_slots=model.context_slots,
                rounds=rounds,
                accepted_length=(len(answer.tokens) - 1) / rounds if rounds else None,
                accepted_histogram=counts.tolist(),
            )
    return replayed


def _features(model: Generator, text: list[int]) -> Array:
    """What the target makes of each token of a text [T], padded to whole passes: [S, (1 + taps) H]."""
    plan, tokens = model.plan(), _padded(text, 0)
    cache = kv_cache.empty(plan.config, len(tokens), model.runtime.dtype)
    parts = []
    for first in range(0, len(tokens), PASS):
        here = tokens[first : first + PASS]
        part, cache = _passed(plan, model.weights.target, cache, here, np.int32(first))
        parts.append(part)
    return jnp.concatenate(parts)


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("cache",), compiler_options=engine.EXACT)
def _passed(
    plan: engine.Plan, target: LlamaParams, cache: KVCache, tokens: Array, first: Array
) -> tuple[Array, KVCache]:
    """Run part of a text [PASS] through the target."""
    where, kernels = Placement.chain(first, PASS), plan.kernels.for_prompts()
    return llama.forward(target, plan.config, tokens, where, cache, kernels=kernels, taps=plan.drafter.taps)


def _padded(values: list[int], filling: int, more: int = 0) -> np.ndarray:
    """Values [T] as int32, with `more` and up to whole passes beyond them."""
    size = -(-(len(values) + more) // PASS) * PASS
    return np.concatenate([values, np.full(size - len(values), filling)]).astype(np.int32)


def histogram(model: Generator, text: list[int], prompt: int, features: Array) -> np.ndarray:
    """Rounds by the number of drafts that they emit [D+1], of a text whose first `prompt` tokens are given.

    features: [S, ...] of the text's tokens, as `_features` gives them.
    """
    plan, weights = model.plan(), model.weights.draft
    more = plan.margin + PASS  # what a slice beyond the text's end may reach
    tokens = _padded(text, -1, more)
    features = jnp.pad(features, ((0, len(tokens) - features.shape[0]), (0, 0)))
    memory: Any = plan.drafter.new_memory(len(tokens), model.runtime.dtype)
    real = np.maximum(tokens, 0)
    for first in range(0, prompt, PASS):
        count = np.int32(min(PASS, prompt - first))
        part, here = real[first : first + PASS + 1], features[first : first + PASS]
        memory = _read(plan, weights, memory, here, part, np.int32(first), count)
    last = np.int32(len(text) - 1)
    return np.asarray(_rounds(plan, weights, memory, features, tokens, np.int32(prompt), last))


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("memory",), compiler_options=engine.EXACT)
def _read(
    plan: engine.Plan,
    weights: DraftWeights,
    memory: DraftMemory,
    features: Array,
    tokens: Array,
    first: Array,
    count: Array,
) -> DraftMemory:
    """Let the drafter take in part of a prompt: features [PASS, ...], tokens [PASS + 1]."""
    return plan.drafter.prefill(weights, features, tokens, first, count, memory)


@functools.partial(jax.jit, static_argnames=("plan",), compiler_options=engine.EXACT)
def _rounds(
    plan: engine.Plan,
    weights: DraftWeights,
    memory: DraftMemory,
    features: Array,
    text: Array,
    begin: Array,
    last: Array,
) -> Array:
    """The rounds from the root at position `begin` to the text's last token: how many emitted 1, 2, ... D+1 tokens.

    text: [S] int32, -1 behind its end. features: [S, ...].
    """
    depth, drafter = plan.tree.depth, plan.drafter
    State = tuple[Array, Array, DraftMemory, Array]

    def one(state: State) -> State:
        length, count, memory, seen = state
        accepted = Accepted(
            features=lax.dynamic_slice_in_dim(features, length - count, depth + 1),
            next_tokens=jnp.maximum(lax.dynamic_slice_in_dim(text, length - count + 1, depth + 1), 0),
            count=count,
        )
        turn = Turn(accepted, text[length], length, text)
        lead, memory = drafter.take_in(weights, turn, memory)
        tree, memory = drafter.propose(weights, plan.tree, lead, turn, memory)
        _, drafts = accepted_path(tree, text[length + 1 + tree.depth], depth)
        emitted = jnp.minimum(drafts + 1, last - length).astype(jnp.int32)
        return length + emitted, emitted, memory, seen.at[emitted - 1].add(1)

    state: State = begin, jnp.int32(1), memory, jnp.zeros(depth + 1, jnp.int32)
    return lax.while_loop(lambda state: state[0] < last, one, state)[3]
