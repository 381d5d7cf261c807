"""What the target makes of each emitted token: its log-probability, and the likeliest others beside it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from pallas_kernels import largest

MOST = 20  # likeliest tokens that can be shown beside each


@struct.dataclass
class Likelihood:
    """Of T tokens, under the target's own distribution: before temperature, penalties and filters."""

    logprob: Array  # [T] float32, of the token itself
    ids: Array  # [T, MOST] int32, the likeliest tokens
    logprobs: Array  # [T, MOST] float32, theirs

    @classmethod
    def unknown(cls, tokens: int) -> Likelihood:
        """Room for so many tokens."""
        zeros = jnp.zeros((tokens, MOST), jnp.float32)
        return cls(zeros[:, 0], zeros.astype(jnp.int32), zeros)

    @classmethod
    def of(cls, logits: Array, tokens: Array) -> Likelihood:
        """Of tokens [T] that were chosen from logits [T, V], float32."""
        with jax.named_scope("likelihood"):
            logs = jax.nn.log_softmax(logits, axis=-1)
            best, ids = largest.top_k(logs, min(MOST, logits.shape[-1]))
            spare = ((0, 0), (0, MOST - ids.shape[1]))
            mine = jnp.take_along_axis(logs, tokens[:, None], axis=-1)[:, 0]
            return cls(mine, jnp.pad(ids, spare), jnp.pad(best, spare, constant_values=-jnp.inf))

    @classmethod
    def if_wanted(cls, wanted: Array, logits: Array, tokens: Array, rows: Array) -> Likelihood:
        """Of tokens [T] chosen from the rows [T] of logits [N, V], if `wanted` [] bool: else not a row is looked at."""
        unknown = cls.unknown(tokens.shape[0])
        return lax.cond(wanted, lambda logits: cls.of(logits[rows], tokens), lambda _: unknown, logits)

    def written(self, new: Likelihood, at: Array) -> Likelihood:
        """With those of more tokens from place `at` on."""
        first = jnp.zeros((), at.dtype)

        def put(old: Array, fresh: Array) -> Array:
            return lax.dynamic_update_slice(old, fresh, (at, first)[: old.ndim])

        return jax.tree.map(put, self, new)

    def shown(self, count: int, top: int) -> tuple[Likely, ...]:
        """Of the first `count` tokens, with the `top` likeliest beside each."""
        own, ids, logprobs = (np.asarray(x)[:count].tolist() for x in (self.logprob, self.ids, self.logprobs))
        return tuple(
            Likely(mine, tuple(zip(best[:top], said[:top], strict=True)))
            for mine, best, said in zip(own, ids, logprobs, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Likely:
    """What the target makes of a token."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest ids and their log-probabilities, as many as were asked for
