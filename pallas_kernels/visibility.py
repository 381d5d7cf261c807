"""Who sees whom: cache rows that everyone sees, and one bit a row for those that follow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax


def bit_words(visible: Array) -> Array:
    """Pack booleans [..., R] into int32 words [..., ceil(R / 32)], bit r % 32 of word r // 32."""
    rows = visible.shape[-1]
    words = -(-rows // 32)
    pad = [(0, 0)] * (visible.ndim - 1) + [(0, words * 32 - rows)]
    bits = jnp.pad(visible, pad).reshape(*visible.shape[:-1], words, 32).astype(jnp.uint32)
    return lax.bitcast_convert_type((bits << jnp.arange(32, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32), jnp.int32)


def constant_words(visible: np.ndarray) -> Array:
    """`bit_words` of what is known beforehand: no program works it out again."""
    pad = [(0, 0)] * (visible.ndim - 1) + [(0, -visible.shape[-1] % 32)]
    return jnp.asarray(np.packbits(np.pad(visible, pad), axis=-1, bitorder="little").view("<i4"))


def has_bit(words: Array, row: Array) -> Array:
    """Whether bit `row` is set in `words` [T, W]: booleans [T, *row.shape]; rows outside 0 .. 32 W - 1 are unset."""
    inside = (row >= 0) & (row < 32 * words.shape[-1])
    at = jnp.where(inside, row, 0)
    return inside & ((words[:, at >> 5] >> (at & 31)) & 1).astype(bool)


def causal(tokens: int) -> Array:
    """Ancestor words [T, ceil(T / 32)] of a chain: each token sees itself and those before it."""
    return constant_words(np.tri(tokens, dtype=bool))


@struct.dataclass
class Sees:
    """Which cache rows each of T tokens attends to.

    Rows below `committed` are seen by all. Row `committed + r` is seen by token i if bit r of `ancestors[i]` is set.
    With two committed rows (a, b), and a root (r) below which a tree has two children (x, y) and a grandchild (z
    below x), the tokens r, x, y, z see, of the rows a b | r x y z:

        r:  1 1 | 1 0 0 0
        x:  1 1 | 1 1 0 0
        y:  1 1 | 1 0 1 0
        z:  1 1 | 1 1 0 1

    A chain of ancestors (`causal`) is ordinary causal attention. Where attention has a window, `first` takes away the
    committed rows that lie too far back, and `ancestors` has no bit for such rows of the tree.
    """

    committed: Array  # int32 scalar, rows that every token sees
    ancestors: Array  # [T, W] int32 bit words over the rows from `committed` on, each token's own included
    first: Array | None = None  # [T] int32, the first committed row that each token sees; None: all see all of them

    def each(self) -> Sees:
        """The same as that of a batch of one."""
        return jax.tree.map(lambda x: x[None], self)

    def only(self) -> Sees:
        """The one of a batch of one."""
        return jax.tree.map(lambda x: x[0], self)

    @property
    def end(self) -> Array:
        """The first cache row that no token sees, rounded up to a whole word: int32."""
        return self.committed + 32 * self.ancestors.shape[1]

    def rows(self, row: Array) -> Array:
        """Whether each token sees the cache rows `row` [R] int32: booleans [T, R]."""
        committed = (row < self.committed)[None]
        if self.first is not None:
            committed = committed & (row[None] >= self.first[:, None])
        return committed | has_bit(self.ancestors, row - self.committed)

    def dense(self, capacity: int) -> Array:
        """The whole mask, for references and plots: booleans [T, capacity]."""
        return self.rows(jnp.arange(capacity, dtype=jnp.int32))
