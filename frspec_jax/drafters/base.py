"""The few methods that the engine asks of a drafter, and what it hands over after each round."""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp
from flax import struct
from jax import Array

from frspec_jax.config import TreeConfig
from frspec_jax.tree import DraftTree


@struct.dataclass
class Accepted:
    """The tokens that the last round committed, with what the target made of them.

    They stand at positions `length - count .. length - 1`; rows past `count` are padding.
    """

    features: Array  # [D+1, H], the target's
    next_tokens: Array  # [D+1] int32, the token after each one; the last is the root
    count: Array  # int32, 1 to D+1


class Drafter(Protocol):
    """Static and hashable: sizes only. Its weights and its cache are pytrees that the engine carries."""

    def new_cache(self, capacity: int, dtype: jnp.dtype) -> Any:
        """The drafter's own cache for `capacity` positions."""

    def prefill(
        self, weights: Any, embedding: Array, features: Array, next_tokens: Array, start: Array, cache: Any
    ) -> Any:
        """Take in a chunk of a prompt.

        embedding: [V, H], the target's. features: [T, H] of the tokens at `start` .. `start + T - 1`.
        next_tokens: [T]; the last real one is not known yet, so its row is taken in again by `propose`.
        """

    def propose(
        self,
        weights: Any,
        embedding: Array,
        tree: TreeConfig,
        accepted: Accepted,
        root: Array,
        length: Array,
        cache: Any,
    ) -> tuple[DraftTree, Any]:
        """Take in what was accepted, then grow a tree below the root.

        root: int32 scalar, the last emitted token. length: int32 scalar, the root's position.
        """


class Vanilla:
    """Proposes nothing: the tree is the root alone, and a round emits one token."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vanilla)

    def __hash__(self) -> int:
        return hash(Vanilla)

    def new_cache(self, capacity: int, dtype: jnp.dtype) -> Any:
        return ()

    def prefill(
        self, weights: Any, embedding: Array, features: Array, next_tokens: Array, start: Array, cache: Any
    ) -> Any:
        return cache

    def propose(
        self,
        weights: Any,
        embedding: Array,
        tree: TreeConfig,
        accepted: Accepted,
        root: Array,
        length: Array,
        cache: Any,
    ) -> tuple[DraftTree, Any]:
        return DraftTree.of_root(root), cache
