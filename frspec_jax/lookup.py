"""Prompt lookup: where the last tokens of a text occurred before, what followed them there.

Much of what a model writes stands in its context already: names out of a text that it sums up, lines of code, digits of
a problem. A place where the same tokens stood before is found by a few comparisons, and reads no weight at all, so
that a chain of tokens from there costs nothing but its verification (prompt lookup decoding).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

LONGEST = 6  # tokens of a match that count


@struct.dataclass
class Chain:
    """What followed the last tokens where they occurred before."""

    tokens: Array  # [T] int32, the ids that would follow the root
    match: Array  # int32, how many of the last tokens are the same there: 0 (it occurred nowhere) to `LONGEST`


def chain(text: Array, length: Array, tokens: int) -> Chain:
    """The `tokens` that followed the longest match of the text's end; of equally long ones, the latest.

    A match whose text ends before the chain does is taken to repeat itself, as a text of one period would.

    Args:
      text: [S + 1] int32, of which positions 1 .. `length` are read; the last token is the root.
    """
    with jax.named_scope("lookup"):
        place = jnp.arange(text.shape[0], dtype=jnp.int32)
        longest = jnp.zeros_like(place)
        same = (place >= 1) & (place < length)
        for back in range(LONGEST):
            before = text if back == 0 else jnp.concatenate([jnp.full(back, -1, jnp.int32), text[:-back]])
            same &= (before == text[jnp.maximum(length - back, 0)]) & (place > back)
            longest += same
        at = jnp.argmax(longest * text.shape[0] + place * (longest > 0)).astype(jnp.int32)
        period = jnp.maximum(length - at, 1)
        following = at + 1 + jnp.arange(tokens, dtype=jnp.int32) % period
        return Chain(text[following], longest[at])
