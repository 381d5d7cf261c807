"""What is decided for several texts at once.

A batch is the round of one text under `vmap`. A branch that one of them takes and another does not would be run for
both; so whatever a round decides, it decides for all of its texts, by what they have in common: a sum over them.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Together:
    """The texts of a round, as one of them sees it."""

    axis: str | None = None  # of `vmap`; None: the text is alone
    running: Array | None = None  # bool, whether this text is being decoded, or only has a place among the others

    def total(self, x: Array) -> Array:
        """The sum of each text's own `x`, over those that are being decoded."""
        if self.axis is None:
            return x
        mine = x if self.running is None else jnp.where(self.running, x, jnp.zeros_like(x))
        return lax.psum(mine, self.axis)

    def any(self, x: Array) -> Array:
        """Whether `x` [] bool holds for any text that is being decoded."""
        return x if self.axis is None else self.total(x.astype(jnp.int32)) > 0

    def all(self, x: Array) -> Array:
        """Whether `x` [] bool holds for each of them."""
        return x if self.axis is None else ~self.any(~x)

    @property
    def count(self) -> Array:
        """How many are being decoded: float32."""
        return self.total(jnp.ones((), jnp.float32))


ALONE = Together()
