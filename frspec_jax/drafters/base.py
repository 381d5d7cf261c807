"""The few methods that the engine asks of a drafter, what it hands over after each round, and how a draft is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from frspec_jax.config import ModelConfig, TreeConfig
from frspec_jax.errors import UserError
from frspec_jax.tree import DraftTree
from pallas_kernels.dispatch import Kernels


@struct.dataclass
class Accepted:
    """The tokens that the last round committed, with what the target made of them.

    They stand at positions `length - count .. length - 1`; rows past `count` are padding.
    """

    features: Array  # [D+1, (1 + taps) H], the target's
    next_tokens: Array  # [D+1] int32, the token after each one; the last is the root
    count: Array  # int32, 1 to D+1


class Drafter(Protocol):
    """Static and hashable: sizes only. Its weights and its cache are pytrees that the engine carries."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose inputs it reads, which then stand beside each feature (`llama.forward`)."""

    def new_cache(self, capacity: int, dtype: jnp.dtype) -> Any:
        """The drafter's own cache for `capacity` positions."""

    def prefill(
        self, weights: Any, embedding: Array, features: Array, next_tokens: Array, start: Array, cache: Any
    ) -> Any:
        """Take in a chunk of a prompt.

        embedding: [V, H], the target's. features: [T, (1 + taps) H] of the tokens at `start` .. `start + T - 1`.
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


class Cacheless:
    """For drafters that remember nothing between rounds: what the prompt was, they read off the last feature."""

    taps: ClassVar[tuple[int, ...]] = ()

    def new_cache(self, capacity: int, dtype: jnp.dtype) -> Any:
        return ()

    def prefill(
        self, weights: Any, embedding: Array, features: Array, next_tokens: Array, start: Array, cache: Any
    ) -> Any:
        return cache


class Vanilla(Cacheless):
    """Proposes nothing: the tree is the root alone, and a round emits one token."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vanilla)

    def __hash__(self) -> int:
        return hash(Vanilla)

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


Spec = TypeVar("Spec", bound="DraftSpec")


def no_copies(spec: Spec, on: bool) -> Spec:
    """`DraftSpec.copies` of a kind that cannot."""
    if on:
        raise UserError(f"--copying on: a draft of kind {spec.kind} does not copy; give an EAGLE-2 one")
    return spec


class DraftSpec(Protocol):
    """A draft as its config.json describes it: frozen and hashable. One class a kind, named in `drafters.KINDS`."""

    kind: ClassVar[str]  # what config.json says; also the method's name in results

    @property
    def hidden_size(self) -> int:
        """H of the target whose features it reads."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Out of a config.json, whose other entries are left alone. Raises KeyError, TypeError or ValueError."""

    def to_json(self) -> dict[str, Any]:
        """The entries that `from_json` reads."""

    def shapes(self, target: ModelConfig, dtype: Any = np.float32) -> Any:
        """The weights, as a pytree of `ShapeDtypeStruct`s."""

    def vocabulary(self, params: Any) -> np.ndarray | None:
        """The ids that its own head can propose; None: all of the target's."""

    def copies(self, on: bool) -> Self:
        """The same draft with copying (`drafters.copying`) switched on or off.

        Raises:
          UserError: it is of a kind that cannot copy.
        """

    def fit(self, tree: TreeConfig) -> TreeConfig:
        """The tree that it grows where `tree` is asked for; a draft with a tree of its own may offer fewer nodes."""

    def assemble(
        self, target: ModelConfig, params: Any, head: Array, ids: np.ndarray, *, kernels: Kernels, int8: bool
    ) -> tuple[Drafter, Any]:
        """The drafter, and the weights that it reads in each round.

        Args:
          params: of `shapes`. head: [V, H], the target's LM head.
          ids: [V'] int32, what the draft may propose: every head of it is cropped to them.
          kernels: which implementations run. int8: round the heads, as in `vocabulary.crop`.
        """
