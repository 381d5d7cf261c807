"""The few methods that the engine asks of a drafter, what it hands over after each round, and how a draft is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from frspec_jax.config import ModelConfig, TreeConfig
from frspec_jax.errors import UserError
from frspec_jax.llama import LlamaParams
from frspec_jax.pace import Pace
from frspec_jax.schema import checked
from frspec_jax.tree import Candidates, DraftTree, Going
from pallas_kernels.dispatch import Kernels


@struct.dataclass
class Accepted:
    """The tokens that the last round committed, with what the target made of them.

    They stand at positions `length - count .. length - 1`; rows past `count` are padding.
    """

    features: Array  # [D+1, (1 + taps) H], the target's
    next_tokens: Array  # [D+1] int32, the token after each one; the last is the root
    count: Array  # int32, 1 to D+1


@struct.dataclass
class Turn:
    """What a round hands over to the drafter: it is its turn to propose."""

    accepted: Accepted  # what it has not taken in yet
    root: Array  # int32, the last emitted token
    length: Array  # int32, n: the root's position, and the tokens committed before it
    text: Array | None  # [S + 1] int32, the tokens at positions 1 .. n; None where nobody reads it (`reads_text`)


@struct.dataclass
class DraftWeights:
    """The arrays that a drafter reads in each round; a drafter that reads some has a class of its own."""


@struct.dataclass
class DraftMemory:
    """The arrays that a drafter keeps from round to round; a drafter that keeps some has a class of its own."""


@struct.dataclass
class DraftParams:
    """A draft's own weights, as its folder keeps them; a kind that keeps some has a class of its own."""


NO_WEIGHTS, NO_MEMORY, NO_PARAMS = DraftWeights(), DraftMemory(), DraftParams()

W = TypeVar("W", bound=DraftWeights, contravariant=True)
M = TypeVar("M", bound=DraftMemory)
Params = TypeVar("Params", bound=DraftParams)


class Drafter(Protocol[W, M]):
    """Static and hashable: sizes only. Its weights and its memory are pytrees that the engine carries."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose inputs it reads, which then stand beside each feature (`llama.forward`)."""

    def new_memory(self, capacity: int, dtype: jnp.dtype) -> M:
        """What it remembers before it has seen anything; for texts of up to `capacity` tokens."""

    @property
    def reads_text(self) -> bool:
        """Whether it looks at the text so far (`Turn.text`)."""

    def prefill(self, weights: W, features: Array, tokens: Array, start: Array, count: Array, memory: M) -> M:
        """Take in a chunk of a prompt, of which `count` tokens are real.

        features: [T, (1 + taps) H] of the tokens at `start` .. `start + T - 1`.
        tokens: [T + 1], one more. Of the last real one the next is not known yet, so its row is taken in again by
          `take_in`.
        """

    def take_in(self, weights: W, turn: Turn, memory: M) -> tuple[Array, M]:
        """Take in what was accepted: what the drafter begins with below the root, [...], and its memory."""

    def propose(self, weights: W, tree: TreeConfig, lead: Array, turn: Turn, memory: M) -> tuple[DraftTree, M]:
        """A tree below the root, where `take_in` gave `lead`."""

    def offer(
        self, weights: W, tree: TreeConfig, lead: Array, turn: Turn, memory: M, going: Going
    ) -> tuple[Candidates, Array, M]:
        """Every node that it would propose, level by level as far as `going` goes on, and how many levels (int32)."""

    def by_level(self, tree: TreeConfig) -> tuple[int, ...]:
        """How many candidates `offer` has at each depth below the root, in the order of their numbers."""

    def each_pass(self, weights: W) -> tuple[Any, ...]:
        """Those of the weights that are read whole each time that it predicts: what a floor in bytes counts."""

    def passes(self, tree: TreeConfig) -> int:
        """How often it predicts in a round."""

    def within(self, rows: int) -> Self:
        """The same, for as long as what it remembers fits so many rows (`Kernels.rows`)."""


class Memoryless:
    """For drafters that remember nothing between rounds: what the prompt was, they read off the last feature."""

    taps: ClassVar[tuple[int, ...]] = ()

    def new_memory(self, capacity: int, dtype: jnp.dtype) -> DraftMemory:
        return NO_MEMORY

    def within(self, rows: int) -> Self:
        return self

    @property
    def reads_text(self) -> bool:
        return False

    def prefill(
        self, weights: DraftWeights, features: Array, tokens: Array, start: Array, count: Array, memory: DraftMemory
    ) -> DraftMemory:
        return memory

    def take_in(self, weights: DraftWeights, turn: Turn, memory: DraftMemory) -> tuple[Array, DraftMemory]:
        return turn.accepted.features[turn.accepted.count - 1], memory

    def each_pass(self, weights: DraftWeights) -> tuple[Any, ...]:
        return (weights,)

    def passes(self, tree: TreeConfig) -> int:
        return 1


class Vanilla(Memoryless):
    """Proposes nothing: the tree is the root alone, and a round emits one token."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vanilla)

    def __hash__(self) -> int:
        return hash(Vanilla)

    def propose(
        self, weights: DraftWeights, tree: TreeConfig, lead: Array, turn: Turn, memory: DraftMemory
    ) -> tuple[DraftTree, DraftMemory]:
        return DraftTree.of_root(turn.root), memory

    def offer(
        self, weights: DraftWeights, tree: TreeConfig, lead: Array, turn: Turn, memory: DraftMemory, going: Going
    ) -> tuple[Candidates, Array, DraftMemory]:
        return Candidates.none(0), jnp.int32(0), memory

    def by_level(self, tree: TreeConfig) -> tuple[int, ...]:
        return ()

    def passes(self, tree: TreeConfig) -> int:
        return 0


@struct.dataclass
class Target:
    """The target, as a draft that joins it sees it."""

    config: ModelConfig = struct.field(pytree_node=False)
    params: LlamaParams


Spec = TypeVar("Spec", bound="DraftSpec")


def no_copies(spec: Spec, on: bool) -> Spec:
    """`DraftSpec.copies` of a kind that cannot."""
    if on:
        raise UserError(f"--copying on: a draft of kind {spec.kind} does not copy; give an EAGLE-2 one")
    return spec


class KindDefaults:
    """What a kind of one's own need not say (`DraftSpec`), for a frozen dataclass of it.

    It is drafted from no weights, suits any target, has no head to crop and no slots, does not copy, and grows the tree
    that is asked for. A subclass says what is otherwise, and always `kind`, `title` and `assemble`.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    in_context: ClassVar[bool] = False
    crops: ClassVar[bool] = False
    taps: ClassVar[tuple[int, ...]] = ()
    hidden_size: ClassVar[int | None] = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return checked(cls, data, "its entries")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(cast(Any, self))  # a subclass is a dataclass

    def shapes(self, target: ModelConfig, dtype: Any = np.float32) -> DraftParams:
        return NO_PARAMS

    def vocabulary(self, params: DraftParams) -> np.ndarray | None:
        return None

    def copies(self, on: bool) -> Self:
        if on:
            raise UserError(f"--copying on: a draft of kind {self.kind} does not copy; give an EAGLE-2 one")
        return self

    def fit(self, tree: TreeConfig) -> TreeConfig:
        return tree

    def fit_pace(self, pace: Pace, vocab: int) -> Pace:
        return pace.with_beams(min(pace.growth.top_k, vocab))


class DraftSpec(Protocol[Params]):
    """A draft as its config.json describes it: frozen and hashable.

    One class a kind, named in `drafters.KINDS` or, by other packages, as an entry point (docs/drafters.md).
    """

    kind: ClassVar[str]  # what config.json says
    title: ClassVar[str]  # the method's usual name
    in_context: ClassVar[bool]  # whether it can have slots for ids of the text so far (`slots.Slots`)
    crops: ClassVar[bool]  # whether it has a head, or reads the target's, that can be cropped to a sub-vocabulary

    @property
    def hidden_size(self) -> int | None:
        """H of the target whose features it reads; None: it reads none, and suits any target."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the target whose inputs it reads besides; their number stands for the last one's output."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Out of a config.json, whose other entries are left alone. Raises UserError or ValueError."""

    def to_json(self) -> dict[str, Any]:
        """The entries that `from_json` reads."""

    def shapes(self, target: ModelConfig, dtype: Any = np.float32) -> Params:
        """The weights, as a pytree of `ShapeDtypeStruct`s; without a leaf the draft has no folder params."""

    def vocabulary(self, params: Params) -> np.ndarray | None:
        """The ids that its own head can propose; None: all of the target's."""

    def copies(self, on: bool) -> Self:
        """The same draft with copying (`drafters.copying`) switched on or off.

        Raises:
          UserError: it is of a kind that cannot copy.
        """

    def fit(self, tree: TreeConfig) -> TreeConfig:
        """The tree that it grows where `tree` is asked for; a draft with a tree of its own may offer fewer nodes."""

    def fit_pace(self, pace: Pace, vocab: int) -> Pace:
        """The pace that suits it with a V' of `vocab`, where `pace` suits the device: it may have levels of its own."""

    def assemble(
        self, target: Target, params: Params, ids: np.ndarray, *, kernels: Kernels, int8: bool = False, slots: int = 0
    ) -> tuple[Drafter, DraftWeights]:
        """The drafter, and the weights that it reads in each round.

        Args:
          target: whose embedding it shares, and whose head, if it has none of its own.
          params: of `shapes`.
          ids: [V'] int32, what the draft may propose: every head of it is cropped to them.
          kernels: which implementations run. int8: round the heads, as in `vocabulary.crop`.
          slots: M, how many ids of the text so far it may propose besides; 0 where it is not `in_context`.
        """
