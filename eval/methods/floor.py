"""The floor of a round: the bytes that it must read, whatever it does with them."""

from __future__ import annotations

from typing import Any

import jax

from frspec_jax import kv_cache
from frspec_jax.generator import Generator
from frspec_jax.plan import Plan
from frspec_jax.state import Weights


def round_bytes(model: Generator, context: int) -> int:
    """Bytes that a round of a loaded model must read."""
    return bytes_read(model.plan(), model.weights, context)


def bytes_read(plan: Plan, weights: Weights, context: int) -> int:
    """Bytes that a round must read: target and head once, draft and cropped head at each level, live K/V rows."""

    def size(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    target, config = weights.target, plan.config
    row = 2 * config.num_kv_heads * config.head_dim * kv_cache.stored(target.embedding.dtype).itemsize
    total = size(target.layers) + target.head.nbytes + config.num_layers * context * row
    read = size(plan.drafter.each_pass(weights.draft)) + context * row
    return total + plan.drafter.passes(plan.tree) * read
