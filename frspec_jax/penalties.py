"""Penalties and a bias, which change a request's logits before anything is chosen from them.

Each node of a draft tree is penalised by the tokens of its own path, exactly as a run token by token would penalise it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from frspec_jax.config import Sampling
from frspec_jax.errors import UserError
from frspec_jax.sampling import Adjusting, argument
from frspec_jax.together import ALONE, Together
from frspec_jax.tree import DraftTree
from pallas_kernels.batching import from_pool, in_pool
from pallas_kernels.visibility import has_bit


@struct.dataclass
class Bearing:
    """The tokens that penalties and biases bear on: [V], or for several texts [slots, V]."""

    bias: Array  # float32
    prompt: Array  # bool, whether the prompt holds it
    counts: Array  # int32, how often the answer so far holds it, the root included
    slot: Array | None = None  # int32, which text is meant; None: there is but one

    @classmethod
    def of(cls, sampling: Sampling, prompt: np.ndarray, vocab_size: int) -> Bearing:
        """Before the first token of an answer to `prompt` [T].

        Raises:
          UserError: a bias names an id that the vocabulary does not have.
        """
        bias = np.zeros(vocab_size, np.float32)
        for token, value in sampling.logit_bias:
            if token >= vocab_size:
                raise UserError(f"--logit-bias {token}:{value:g}: the model's token ids are 0 to {vocab_size - 1}")
            bias[token] += value
        held = np.isin(np.arange(vocab_size), prompt)
        return cls(argument(bias, np.float32), argument(held, np.bool_), argument(np.zeros(vocab_size), np.int32))

    @classmethod
    def on_nothing(cls, slots: int, vocab_size: int) -> Bearing:
        """Room for so many texts."""
        zeros = jnp.zeros((slots, vocab_size), jnp.int32)
        return cls(zeros.astype(jnp.float32), zeros.astype(bool), zeros)

    def mine(self) -> tuple[Array, Array, Array]:
        """This text's bias, prompt and counts: [V] each."""
        if self.slot is None:
            return self.bias, self.prompt, self.counts

        def each(pool: tuple[Array, ...], slot: Array) -> tuple[Array, ...]:
            return tuple(rows[slot] for rows in pool)

        bias, prompt, counts = from_pool(each, (self.bias, self.prompt, self.counts), self.slot)
        return bias, prompt, counts

    def after(self, tokens: Array, count: Array) -> Bearing:
        """With the first `count` of some more tokens [T] of the answer."""
        new = (jnp.arange(tokens.shape[0]) < count).astype(jnp.int32)
        if self.slot is None:
            return dataclasses.replace(self, counts=self.counts.at[tokens].add(new))

        def each(counts: Array, own: tuple[Array, Array, Array], _: None) -> tuple[tuple[()], Array]:
            slot, tokens, new = own
            return (), counts.at[slot[:, None], tokens].add(new)

        return dataclasses.replace(self, counts=in_pool(each, self.counts, (self.slot, tokens, new))[1])


@struct.dataclass
class Penalties:
    """The figures of a request, and the tokens that they bear on (`config.Sampling`)."""

    repetition: Array  # float32; 1: off
    presence: Array  # float32; 0: off
    frequency: Array  # float32; 0: off
    active: Array  # bool, whether any of it changes something
    bearing: Bearing | None  # None: in an argument, where the slot's own is meant

    @classmethod
    def of(cls, sampling: Sampling, bearing: Bearing | None) -> Penalties:
        return cls(
            repetition=argument(sampling.repetition_penalty, np.float32),
            presence=argument(sampling.presence_penalty, np.float32),
            frequency=argument(sampling.frequency_penalty, np.float32),
            active=argument(sampling.adjusts, np.bool_),
            bearing=bearing,
        )

    def after(self, tokens: Array, count: Array) -> Penalties:
        """With the first `count` of some more tokens [T] of the answer."""
        assert self.bearing is not None
        return dataclasses.replace(self, bearing=self.bearing.after(tokens, count))

    def on(self, tree: DraftTree, together: Together = ALONE) -> Adjusting:
        """What becomes of the logits [N, V] after each node of a tree, where a request asks for it."""

        def each(logits: Array) -> Array:
            return jnp.where(self.active, adjusted(logits, self, tree), logits)

        return Adjusting(together.any(self.active), each)


def adjusted(logits: Array, by: Penalties, tree: DraftTree) -> Array:
    """Logits [N, V] after each node of a tree, penalised by the answer so far and by what stands above the node."""
    with jax.named_scope("penalties"):
        assert by.bearing is not None
        bias, prompt, before = by.bearing.mine()
        nodes = jnp.arange(tree.tokens.shape[0], dtype=jnp.int32)
        above = has_bit(tree.ancestors, nodes) & (nodes > 0)  # [N, N]; the root is counted already
        counts = jnp.broadcast_to(before, logits.shape)
        counts = counts.at[nodes[:, None], tree.tokens[None]].add(above.astype(jnp.int32))
        seen = (counts > 0) | prompt
        logits = jnp.where(seen, jnp.where(logits > 0, logits / by.repetition, logits * by.repetition), logits)
        return logits - by.frequency * counts - by.presence * (counts > 0) + bias
