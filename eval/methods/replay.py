"""Answers replayed: what each drafting method would have accepted of a text that is known, without its target.

Greedy text is the same whatever drafts, so one answer of vanilla's serves all methods. The target reads it once; then
each method drafts from its features, as in a round, and a draft is accepted where the text goes on with it. Accepted
lengths are those of decoding (tests/eval/test_replay.py), and cost the drafting alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from frspec_jax import kv_cache, llama
from frspec_jax.api import Generator, Result
from frspec_jax.drafters.base import Accepted, DraftMemory, DraftWeights, Turn
from frspec_jax.kv_cache import KVCache
from frspec_jax.llama import LlamaParams
from frspec_jax.placement import Placement
from frspec_jax.plan import EXACT, Plan
from frspec_jax.tree import accepted_path

PASS = kv_cache.BLOCK  # tokens of a text that run at once
TOGETHER = 12  # texts that rounds run for at once: a product of few rows mostly prepares its weight


@dataclasses.dataclass(frozen=True)
class Answered:
    """A prompt, and vanilla's answer to it."""

    prompt: np.ndarray  # [T] int32
    answer: Result


def replayed(models: dict[str, Generator], given: list[Answered]) -> Iterator[dict[str, list[Result]]]:
    """What drafting methods, each of a fixed pace, make of greedy answers: some texts after others, in their order.

    Of the results, times are vanilla's.
    """
    texts = [[*one.prompt.tolist(), *one.answer.tokens] for one in given]
    margin = max(model.plan().margin for model in models.values())
    size = -(-(max(map(len, texts)) + margin) // PASS) * PASS + PASS  # room for what slices reach beyond a text's end
    for first in range(0, len(given), TOGETHER):
        here = slice(first, first + TOGETHER)
        features: dict[tuple[int, ...], Array] = {}
        found: dict[str, list[Result]] = {}
        with jax.enable_x64(False):
            for name, model in models.items():
                taps = model.plan().drafter.taps
                if taps not in features:
                    features[taps] = jnp.stack([features_of(model, text, size) for text in texts[here]])
                begin = [len(one.prompt) for one in given[here]]
                counts = histograms(model, texts[here], begin, features[taps])
                found[name] = [_result(model, *pair) for pair in zip(given[here], counts, strict=True)]
        yield found


def _result(model: Generator, one: Answered, counts: np.ndarray) -> Result:
    rounds = int(counts.sum())
    return dataclasses.replace(
        one.answer,
        method=model.drafting.method.name,
        draft_vocab=model.draft_vocab,
        context_slots=model.context_slots,
        rounds=rounds,
        accepted_length=(len(one.answer.tokens) - 1) / rounds if rounds else None,
        accepted_histogram=counts.tolist(),
    )


def features_of(model: Generator, text: list[int], size: int) -> Array:
    """What the target makes of each token of a text [T], and of nothing behind it: [S, (1 + taps) H], S = `size`."""
    plan, tokens = model.plan(), padded(text, 0, size)
    cache = kv_cache.empty(plan.config, size, model.runtime.dtype)
    parts = []
    for first in range(0, len(text), PASS):
        here = tokens[first : first + PASS]
        part, cache = _passed(plan, model.weights.target, cache, here, np.int32(first))
        parts.append(part)
    known = jnp.concatenate(parts)
    return jnp.pad(known, ((0, size - known.shape[0]), (0, 0)))


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("cache",), compiler_options=EXACT)
def _passed(plan: Plan, target: LlamaParams, cache: KVCache, tokens: Array, first: Array) -> tuple[Array, KVCache]:
    """Run part of a text [PASS] through the target."""
    where, kernels = Placement.chain(first, PASS), plan.kernels.for_prompts()
    return llama.forward(target, plan.config, tokens, where, cache, kernels=kernels, taps=plan.drafter.taps)


def padded(values: list[int], filling: int, size: int) -> np.ndarray:
    """Values [T] and a filling behind them, [size] int32."""
    return np.concatenate([values, np.full(size - len(values), filling)]).astype(np.int32)


def histograms(model: Generator, texts: list[list[int]], prompts: list[int], features: Array) -> np.ndarray:
    """Rounds by the number of drafts that they emit [B, D+1], of B texts that begin with so many prompt tokens each.

    features: [B, S, ...] of the texts' tokens, as `features_of` gives them.
    """
    plan, weights, size = model.plan(), model.weights.draft, features.shape[1]
    tokens = np.stack([padded(text, -1, size) for text in texts])
    read = []
    for text, prompt, known in zip(tokens, prompts, features, strict=True):
        read.append(read_prompt(model, text, prompt, known))
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *read)
    last = np.array([len(text) - 1 for text in texts], np.int32)
    return np.asarray(_rounds(plan, weights, together, features, tokens, np.array(prompts, np.int32), last))


def read_prompt(model: Generator, text: np.ndarray, prompt: int, features: Array) -> DraftMemory:
    """What the drafter remembers of the first `prompt` tokens of a text [S], given the features [S, ...] of each."""
    plan, real = model.plan(), np.maximum(text, 0)
    memory = plan.drafter.new_memory(features.shape[0], model.runtime.dtype)
    for first in range(0, prompt, PASS):
        part, here = real[first : first + PASS + 1], features[first : first + PASS]
        count = np.int32(min(PASS, prompt - first))
        memory = _read(plan, model.weights.draft, memory, here, part, np.int32(first), count)
    return memory


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("memory",), compiler_options=EXACT)
def _read(
    plan: Plan,
    weights: DraftWeights,
    memory: DraftMemory,
    features: Array,
    tokens: Array,
    first: Array,
    count: Array,
) -> DraftMemory:
    """Let the drafter take in part of a prompt: features [PASS, ...], tokens [PASS + 1]."""
    return plan.drafter.prefill(weights, features, tokens, first, count, memory)


# Of each text: the root's position, how many tokens the drafter has not taken in, its memory, and the rounds so far.
State = tuple[Array, Array, DraftMemory, Array]


@functools.partial(jax.jit, static_argnames=("plan",), compiler_options=EXACT)
def _rounds(
    plan: Plan,
    weights: DraftWeights,
    memory: DraftMemory,
    features: Array,
    text: Array,
    begin: Array,
    last: Array,
) -> Array:
    """The rounds of B texts from the root at position `begin` [B] to the last token, at `last` [B].

    text: [B, S] int32, -1 behind its end. features: [B, S, ...].

    Returns:
      How many emitted 1, 2, ... D+1 tokens, [B, D+1] int32.
    """
    depth, drafter = plan.tree.depth, plan.drafter

    def one(
        features: Array, text: Array, last: Array, length: Array, count: Array, memory: DraftMemory, seen: Array
    ) -> State:
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
        goes_on = emitted > 0  # a text that has ended waits for the others
        seen = seen.at[emitted - 1].add(goes_on.astype(jnp.int32))
        return length + emitted, jnp.where(goes_on, emitted, count), memory, seen

    def all_of_them(state: State) -> State:
        return jax.vmap(one)(features, text, last, *state)

    rows = begin.shape[0]
    state: State = begin, jnp.ones(rows, jnp.int32), memory, jnp.zeros((rows, depth + 1), jnp.int32)
    return lax.while_loop(lambda state: (state[0] < last).any(), all_of_them, state)[3]
