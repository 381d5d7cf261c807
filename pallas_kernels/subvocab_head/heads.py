"""A head over a sub-vocabulary, and rows beside it, which may be others in each call."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array


@struct.dataclass
class Head:
    """The V' rows that are scored."""

    weight: Array  # [V', H], floats or int8
    scale: Array | None  # [V'] float32, what each row of a head of int8 is multiplied by; None for a head of floats
    ids: Array | None  # [V'] int32, what each row stands for; None: its own number


@struct.dataclass
class Extra:
    """M further rows, of ids that the head does not hold; each id is there once."""

    weight: Array  # [M, H], floats
    ids: Array  # [M] int32; a row whose id is negative does not count


def joined_ids(head: Head, extra: Extra) -> Array:
    """What all rows stand for, [V' + M] int32: those of the head, then the further ones."""
    own = jnp.arange(head.weight.shape[0], dtype=jnp.int32) if head.ids is None else head.ids
    return jnp.concatenate([own, extra.ids])
