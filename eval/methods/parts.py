"""A round's parts, each a program of its own with the bytes that it must read: what `python -m eval stages` times."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from frspec_jax import engine, kv_cache, llama
from frspec_jax.config import ModelConfig
from frspec_jax.drafters.eagle import Eagle, EagleWeights
from frspec_jax.kv_cache import LayerKV
from frspec_jax.placement import Placement
from frspec_jax.plan import Plan
from frspec_jax.presets import state_at
from frspec_jax.state import DecodeState, Weights
from frspec_jax.tree import Beam, DraftTree, accepted_path, rerank
from frspec_jax.vocabulary import DraftHead
from pallas_kernels import timing
from pallas_kernels.products import einsum_f32
from pallas_kernels.subvocab_head import subvocab_top_k
from pallas_kernels.timing import nudged
from pallas_kernels.visibility import causal


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a round: `step(weights, carry)`, the carry to begin with, and the bytes that it must read."""

    name: str
    times: int  # how often a round runs it
    step: Callable[[Any, Any], Any]
    carry: Any
    bytes: int


def size(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def kv_bytes(config: ModelConfig, context: int, dtype: jnp.dtype) -> int:
    """Bytes of one layer's keys and values for `context` tokens."""
    return 2 * context * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def target_stages(plan: Plan, weights: Weights, context: int, dtype: jnp.dtype) -> Iterator[Stage]:
    """What a round does with the target, whatever V' is; of vanilla's plan, what a step does."""
    config, nodes, depth = plan.config, plan.tree.size, plan.tree.depth
    capacity = kv_cache.rounded_capacity(context + 64 + plan.margin)
    n = jnp.int32(context)
    chain = jnp.arange(nodes, dtype=jnp.int32)

    def layers(held: Weights, carry: Any) -> Any:
        tokens, cache = carry
        where = Placement.chain(n, nodes)
        features, cache = llama.forward(held.target, config, tokens, where, cache, kernels=plan.kernels)
        return nudged(tokens, features), cache

    def head(held: Weights, features: Array) -> Array:
        return nudged(features, jnp.argmax(llama.logits(held.target, config, features), -1))

    caches = kv_cache.empty(config, capacity, dtype)
    features = jnp.ones((nodes, config.hidden_size), dtype)
    live = config.num_layers * kv_bytes(config, context, dtype)
    yield Stage("verify: layers", 1, layers, (chain, caches), size(weights.target.layers) + live)
    yield Stage("verify: head", 1, head, features, weights.target.head.nbytes)
    if plan.tree.size == 1:
        return
    line = jnp.minimum(chain, depth)
    drafted = DraftTree(chain, jnp.maximum(chain - 1, 0), line, causal(nodes))

    def commit(_: Any, carry: Any) -> Any:
        chosen, cache = carry
        path, drafts = accepted_path(drafted, chosen, depth)
        return nudged(chosen, drafts[None]), kv_cache.compact(cache, n, path, plan.kernels.attention)

    moved = 2 * config.num_layers * kv_bytes(config, depth, dtype)
    yield Stage("accept, compact", 1, commit, (chain, caches), moved)


def draft_stages(plan: Plan, weights: Weights, context: int, dtype: jnp.dtype) -> Iterator[Stage]:
    """What a round does with the draft, but for its head."""
    drafter, tree = plan.drafter, plan.tree
    assert isinstance(drafter, Eagle) and isinstance(weights.draft, EagleWeights)
    k, n = tree.top_k, jnp.int32(context)
    hidden = plan.config.hidden_size
    cache = kv_cache.empty(drafter.config, kv_cache.rounded_capacity(context + 64 + plan.margin), dtype)[0]
    bytes_read = size(weights.draft.params) + kv_bytes(drafter.config, context, dtype)

    def run(held: Weights, features: Array, where: Placement, cache: LayerKV) -> tuple[Array, LayerKV]:
        assert isinstance(held.draft, EagleWeights)
        embeddings = held.target.embedding[: features.shape[0]]
        return drafter.extend(held.draft, embeddings, features, where, cache)

    def extend(held: Weights, carry: Any) -> Any:
        features, cache = carry
        outputs, cache = run(held, features, Placement.chain(n, tree.depth + 1), cache)
        return nudged(features, outputs), cache

    def level(held: Weights, carry: Any) -> Any:
        features, cache = carry
        scores, tokens = jnp.zeros(k), jnp.arange(k, dtype=jnp.int32)
        where = Placement.of_level(Beam.start(tree, scores, tokens), 1, n)
        outputs, cache = run(held, features, where, cache)
        return nudged(features, outputs), cache

    def beams(_: Any, scores: Array) -> Array:
        tokens = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (k, k))
        beam = Beam.start(tree, scores[0], tokens[0])
        for _level in range(1, tree.depth):
            beam, _parents = beam.grow(scores, tokens, drafter.kernels.attention)
        return nudged(scores, rerank(tree, beam.history, jnp.int32(0)).depth)

    yield Stage("extend", 1, extend, (jnp.ones((tree.depth + 1, hidden), dtype), cache), bytes_read)
    yield Stage("level: layer", tree.depth - 1, level, (jnp.ones((k, hidden), dtype), cache), bytes_read)
    yield Stage("beams, re-rank", 1, beams, -jnp.arange(k * k, dtype=jnp.float32).reshape(k, k), 0)


def head_stages(plan: Plan, weights: Weights, dtype: jnp.dtype) -> Iterator[Stage]:
    """The draft's head as the engine runs it, and of that the bare product; once a level."""
    assert isinstance(plan.drafter, Eagle) and isinstance(weights.draft, EagleWeights)
    k, kernels = plan.tree.top_k, plan.drafter.kernels

    def head_of(held: Weights) -> DraftHead:
        assert isinstance(held.draft, EagleWeights)
        return held.draft.head

    def whole(held: Weights, rows: Array) -> Array:
        kept = head_of(held)
        return nudged(rows, subvocab_top_k(rows, kept.weight, k, kept.scale, implementation=kernels.head)[0])

    def product(held: Weights, rows: Array) -> Array:
        return nudged(rows, einsum_f32("mh,vh->mv", rows, head_of(held).weight))

    for name, step in (("level: head, top-k", whole), ("(its product alone)", product)):
        rows = jnp.ones((k, plan.config.hidden_size), dtype)
        yield Stage(name, plan.tree.depth, step, rows, weights.draft.head.weight.nbytes)


def round_us(plan: Plan, weights: Weights, context: int, dtype: jnp.dtype, rounds: int) -> float:
    """Microseconds of a whole round, in the engine's own loop: the median of five loops of `rounds`."""
    capacity = kv_cache.rounded_capacity(context + rounds * (plan.tree.depth + 1) + plan.margin)

    def loop(held: Weights, state: DecodeState) -> DecodeState:
        state = dataclasses.replace(state, length=jnp.int32(context), emitted=jnp.int32(1), finished=jnp.int32(0))
        return engine.decode_rounds(plan, held, state, jnp.int32(rounds))

    state = jax.jit(functools.partial(state_at, plan, capacity=capacity, dtype=dtype))(jnp.int32(context))
    return timing.looped(loop, weights, state, 1) / rounds
