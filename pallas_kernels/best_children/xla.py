"""The next beams in XLA, by counting: a chain of small fusions."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array, lax


@struct.dataclass
class Children:
    """The K best of K² children, the best first, and the scores of all."""

    number: Array  # [K] int32, among the K²
    tokens: Array  # [K] int32
    scores: Array  # [K] float32, with their beams' scores
    sees: Array  # [K, W] int32 bit words: their beams' rows, and their own
    every: Array  # [K²] float32, the scores of all children


def best_children(beams: Array, scores: Array, tokens: Array, sees: Array, own: Array) -> Children:
    """`pallas_kernels.best_children.best_children`; arguments and result as there."""
    k = beams.shape[0]
    every = (beams[:, None] + scores).reshape(-1)
    # Every child against every other, and no sort, which on a GPU is a launch of its own.
    child = jnp.arange(k * k, dtype=jnp.int32)
    earlier = child[None] < child[:, None]
    ahead = (every[None] > every[:, None]) | ((every[None] == every[:, None]) & earlier)
    place = ahead.sum(-1, dtype=jnp.int32)
    number = lax.argmax(place[None] == jnp.arange(k, dtype=jnp.int32)[:, None], 1, jnp.int32)
    return Children(number, tokens.reshape(-1)[number], every[number], sees[number // k] | own, every)
