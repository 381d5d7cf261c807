"""Rows beside a head, which may be others in each call."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array


@struct.dataclass
class Extra:
    """M further rows, of ids that the head does not hold; each id is there once."""

    weight: Array  # [M, H], floats
    ids: Array  # [M] int32; a row whose id is negative does not count


def joined_ids(head: Array, ids: Array | None, extra: Extra) -> Array:
    """What all rows stand for, [V' + M] int32: those of the head [V', H], then the further ones."""
    own = jnp.arange(head.shape[0], dtype=jnp.int32) if ids is None else ids
    return jnp.concatenate([own, extra.ids])
