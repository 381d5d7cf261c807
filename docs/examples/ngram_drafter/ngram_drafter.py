"""A drafter of n-grams: what followed the last tokens where they stood before, is guessed to follow them again.

Nothing is trained and nothing is stored: the text so far is the model. `python ngram_drafter.py CKPT` puts a draft of
this kind into a checkpoint, as CKPT/drafts/ngram.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from frspec_jax.checkpoint import Checkpoint, add_draft
from frspec_jax.drafters.base import NO_WEIGHTS, DraftWeights, Target, Turn
from frspec_jax.drafters.chains import ChainDrafter, ChainKind, Guess

LIKELY = 0.7  # how often such a guess is right, roughly; a pace measures what comes of it and corrects it


@dataclasses.dataclass(frozen=True)
class Ngram(ChainDrafter):
    """Static: the engine compiles a round for it."""

    order: int  # tokens that must be the same
    reads_text: ClassVar[bool] = True

    def guess(self, weights: DraftWeights, turn: Turn, tokens: int) -> Guess:
        """One token after the other: each time the latest place where the last `order` tokens stood."""
        assert turn.text is not None
        place = jnp.arange(turn.text.shape[0], dtype=jnp.int32)
        last = turn.text[jnp.maximum(turn.length - jnp.arange(self.order), 0)]  # [order], the latest first
        said, found = [], []
        for _ in range(tokens):
            same = (place >= self.order) & (place < turn.length)
            for back in range(self.order):
                same &= jnp.roll(turn.text, back) == last[back]
            at = jnp.max(jnp.where(same, place, 0))
            follows = turn.text[at + 1]
            said.append(follows)
            found.append(at > 0)
            last = jnp.concatenate([follows[None], last[:-1]])
        return Guess(jnp.stack(said), jnp.where(jnp.stack(found), np.log(LIKELY), -jnp.inf))


@dataclasses.dataclass(frozen=True)
class NgramKind(ChainKind):
    """What CKPT/drafts/NAME/config.json says of a draft of this kind."""

    order: int = 2

    kind: ClassVar[str] = "ngram"
    title: ClassVar[str] = "n-grams"

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 8:
            raise ValueError(f"order {self.order} must be 1 to 8")

    def assemble(self, target: Target, params: Any, ids: np.ndarray, **how: Any) -> tuple[Ngram, DraftWeights]:
        """Nothing to join: the drafter reads no weights."""
        return Ngram(self.order), NO_WEIGHTS


if __name__ == "__main__":
    print(f"wrote {add_draft(Checkpoint.open(sys.argv[1]), 'ngram', NgramKind())}")
