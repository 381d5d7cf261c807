"""For drafters of one's own that propose one token after the other, with nothing beside: everything but the guess.

Such a drafter needs no training and no weights. It says what would follow, and how likely it takes that to be; what a
tree is, what a pace asks, and what waits for the target is settled here. docs/drafters.md builds one.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from frspec_jax.config import TreeConfig
from frspec_jax.drafters.base import DraftMemory, DraftWeights, KindDefaults, Memoryless, Turn
from frspec_jax.pace import Pace
from frspec_jax.tree import ALL_THE_WAY, Candidates, DraftTree, Going
from pallas_kernels.visibility import constant_words


@struct.dataclass
class Guess:
    """What a drafter thinks would follow the root."""

    tokens: Array  # [T] int32, full-vocabulary ids; where `scores` is -inf, any
    scores: Array  # [T] float32, log-probability that the target says each one, if it says those before it


class ChainDrafter(Memoryless, abc.ABC):
    """A drafter (`base.Drafter`) of a chain; a subclass is a frozen dataclass with `guess` alone."""

    @abc.abstractmethod
    def guess(self, weights: DraftWeights, turn: Turn, tokens: int) -> Guess:
        """The `tokens` that would follow; `turn` has the root, its position, and the text, if `reads_text`."""

    def propose(
        self, weights: DraftWeights, tree: TreeConfig, lead: Array, turn: Turn, memory: DraftMemory
    ) -> tuple[DraftTree, DraftMemory]:
        with jax.named_scope("guess"):
            guess = self.guess(weights, turn, tree.size - 1)
        nodes = jnp.arange(tree.size, dtype=jnp.int32)
        tokens = jnp.concatenate([turn.root[None], guess.tokens.astype(jnp.int32)])
        sees = constant_words(np.tri(tree.size, dtype=bool))  # each node itself and all before it
        return DraftTree(tokens, jnp.maximum(nodes - 1, 0), nodes, sees), memory

    def offer(
        self,
        weights: DraftWeights,
        tree: TreeConfig,
        lead: Array,
        turn: Turn,
        memory: DraftMemory,
        going: Going = ALL_THE_WAY,
    ) -> tuple[Candidates, Array, DraftMemory]:
        with jax.named_scope("guess"):
            guess = self.guess(weights, turn, tree.depth)
        each = [going.likely(jnp.minimum(guess.scores[level], 0.0), level) for level in range(tree.depth)]
        likely = jnp.where(jnp.isneginf(guess.scores), -jnp.inf, jnp.stack(each))
        number = jnp.arange(tree.depth, dtype=jnp.int32)
        candidates = Candidates(guess.tokens.astype(jnp.int32), jnp.cumsum(likely), number - 1)
        return candidates, jnp.int32(1), memory

    def by_level(self, tree: TreeConfig) -> tuple[int, ...]:
        return (1,) * tree.depth


class ChainKind(KindDefaults):
    """What a kind of such drafts (`base.DraftSpec`) need not say: its tree is a chain, whatever is asked for."""

    def fit(self, tree: TreeConfig) -> TreeConfig:
        depth = min(tree.depth, tree.size - 1)
        return TreeConfig(1 + depth, depth, 1)

    def fit_pace(self, pace: Pace, vocab: int) -> Pace:
        return dataclasses.replace(pace, growth=TreeConfig(2, pace.growth.depth, 1))
