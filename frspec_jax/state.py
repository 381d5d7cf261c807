"""The arrays that decoding reads and carries: weights, caches, what a request asks for, and the state of a text."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from frspec_jax import kv_cache
from frspec_jax.config import Sampling
from frspec_jax.drafters.base import Accepted, DraftMemory, DraftWeights
from frspec_jax.kv_cache import KVCache
from frspec_jax.likelihood import Likelihood
from frspec_jax.llama import LlamaParams
from frspec_jax.pace import PaceTables, Pulse, Trust
from frspec_jax.penalties import Penalties
from frspec_jax.plan import Plan
from frspec_jax.sampling import Draw, argument
from frspec_jax.sharding import Split

RUNNING, STOPPED, FULL = 0, 1, 2  # DecodeState.finished
OWN, DRAFTED, COPIED = 0, 1, 2  # DecodeState.origins: the target's own tokens, and accepted drafts


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

    def text_with(self, tokens: Array, position: Array) -> Array | None:
        """The text with `tokens` [T] from a position on; what is no token of it yet is written over later."""
        return None if self.text is None else lax.dynamic_update_slice(self.text, tokens, (position,))


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
        kv_heads = Split(plan.config, plan.mesh.devices.size).all_kv_heads
    target = kv_cache.empty(plan.config, capacity, dtype, kv_heads)
    return Caches(target, plan.drafter.new_memory(capacity, dtype), text)


def state_after(plan: Plan, caches: Caches, feature: Array, root: Array, length: Array, asked: Asked) -> DecodeState:
    """The state after `length` tokens: `feature` [H] is the last one's, and `root` the token chosen from it."""
    depth = plan.tree.depth
    room = depth + 1 + (caches.capacity if plan.keeps else 0)
    stopped = plan.stops(root)
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
