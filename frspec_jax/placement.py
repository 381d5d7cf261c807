"""Where the tokens of one pass stand: their positions, the cache rows that they are written to, and what they see."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import struct
from jax import Array

from frspec_jax.tree import Beam, DraftTree
from pallas_kernels.visibility import Sees, bit_words, causal


@struct.dataclass
class Placement:
    """Where T tokens stand. A prompt, one token, a draft tree and a level of one are all such a value."""

    positions: Array  # [T] int32, of the rotary embedding
    write_at: Array  # int32 scalar, a cache row: the first token stands `skip` rows behind it, and the others follow
    sees: Sees
    skip: int = struct.field(pytree_node=False, default=0)

    def within(self, window: int) -> Placement:
        """The same where each token sees only `window` tokens, itself among them; 0: all that it saw.

        For targets, whose committed rows are the text's positions, and whose rows after them are the T tokens here.
        """
        if not window:
            return self
        assert self.skip == 0, "the rows of a draft's earlier levels have positions that are not known here"
        tokens, words = self.positions.shape[0], self.sees.ancestors.shape[1]
        oldest = self.positions - (window - 1)
        near = jnp.pad(self.positions[None] >= oldest[:, None], ((0, 0), (0, 32 * words - tokens)))
        sees = Sees(self.sees.committed, self.sees.ancestors & bit_words(near), jnp.maximum(oldest, 0))
        return dataclasses.replace(self, sees=sees)

    @classmethod
    def chain(cls, start: Array, tokens: int) -> Placement:
        """`tokens` in a row from position `start` on: a chunk of a prompt, or one token."""
        positions = start + jnp.arange(tokens, dtype=jnp.int32)
        return cls(positions, start, Sees(start, causal(tokens)))

    @classmethod
    def of_tree(cls, tree: DraftTree, length: Array) -> Placement:
        """A draft tree after `length` committed tokens: siblings share a position, and no node sees another branch."""
        return cls(length + tree.depth, length, Sees(length, tree.ancestors))

    @classmethod
    def of_level(cls, beam: Beam, level: int, committed: Array) -> Placement:
        """The K beams `level` levels below the root, after `committed` pairs in the draft's cache.

        The draft's pair t stands at position t and holds the token at t + 1, so the first level's beams, which stand
        at `committed + 1`, are pairs at `committed`.
        """
        k = beam.tokens.shape[0]
        positions = jnp.full((k,), committed + level - 1, jnp.int32)
        return cls(positions, committed, Sees(committed, beam.visible), skip=(level - 1) * k)
