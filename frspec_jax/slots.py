"""In-context sub-vocabulary: a draft proposes ids of the text so far too, though its sub-vocabulary lacks them.

What a text has said it says again: names, words of its subject, another language's. Few of them are among the most
frequent tokens, so a small sub-vocabulary loses them at each turn. M slots of the draft's head hold the rows of the ids
that were seen last in this text, its prompt included, and that the sub-vocabulary lacks; the softmax is over V' + M
then. They are arrays of a round like all others: another text compiles nothing, and the target alone still decides.

What is remembered are ids. Their rows are gathered from the whole head once a round, which costs less than one of
the products that read them (docs/vocabulary.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from frspec_jax.vocabulary import WholeHead
from pallas_kernels.subvocab_head import Extra


@struct.dataclass
class Slots:
    """The ids of a text that the sub-vocabulary lacks, each once, the latest first."""

    ids: Array  # [M] int32, -1 where a slot is empty
    last: Array  # [M] int32, the position where each was seen last; -1 where the slot is empty

    @classmethod
    def empty(cls, count: int) -> Slots:
        """So many slots before a text begins."""
        return cls(*(jnp.full(count, -1, jnp.int32) for _ in range(2)))  # two: one buffer is not donated twice

    def emptied(self, if_so: Array) -> Slots:
        """Empty ones, if so."""
        return Slots(jnp.where(if_so, -1, self.ids), jnp.where(if_so, -1, self.last))

    def seeing(self, tokens: Array, start: Array, count: Array, whole: WholeHead | None) -> Slots:
        """The slots after tokens [T], of which the first `count` are real; they stand at positions from `start` on.

        Where there are more ids than slots, those that were seen last stay.
        """
        assert whole is not None
        with jax.named_scope("slots"):
            place = jnp.arange(tokens.shape[0], dtype=jnp.int32)
            real = place < count
            again = (tokens[:, None] == tokens[None]) & (place[:, None] < place[None]) & real[None]
            wanted = real & whole.lacked(tokens) & ~again.any(1)  # each id where it stands last
            here = (self.ids[:, None] == tokens[None]) & wanted[None]  # [M, T]
            last = jnp.where(here, start + place, self.last[:, None]).max(1)
            fresh = wanted & ~here.any(0)
            ids = jnp.concatenate([self.ids, jnp.where(fresh, tokens, -1)])
            last = jnp.concatenate([last, jnp.where(fresh, start + place, -1)])
            # As floats, which hold positions exactly: of integers XLA's CPU backend would sort all.
            _, best = lax.top_k(last.astype(jnp.float32), self.ids.shape[0])
            return Slots(ids[best], last[best])

    def head(self, whole: WholeHead) -> Extra:
        """Their rows, for the draft's head to read."""
        with jax.named_scope("slots"):
            return Extra(whole.rows_of(jnp.maximum(self.ids, 0)), self.ids)
