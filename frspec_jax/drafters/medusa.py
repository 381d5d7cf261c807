"""Medusa: heads that each look one token further ahead, and a tree that never changes (arXiv 2401.10774).

Head i (from 0) reads the target's feature of the last committed token and says what will stand i + 1
places after the root: residual blocks, then an LM head of its own, or the target's. A node of the tree
is a path of ranks ([0, 2]: head 0's best token, then head 1's third best), so a round only fills in
tokens. All heads are cropped to one sub-vocabulary (FR-Spec, arXiv 2502.14856, Table 5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from frspec_jax import shapes
from frspec_jax.config import TREE_LIMIT, ModelConfig, TreeConfig
from frspec_jax.drafters.base import DraftMemory, DraftParams, DraftWeights, Memoryless, Target, Turn, no_copies
from frspec_jax.layers import linear
from frspec_jax.pace import Pace
from frspec_jax.schema import checked
from frspec_jax.tree import ALL_THE_WAY, Candidates, DraftTree, Going
from frspec_jax.vocabulary import DraftHead, crop
from pallas_kernels.dispatch import AUTO, Kernels
from pallas_kernels.subvocab_head import subvocab_top_k

Choices = tuple[tuple[int, ...], ...]  # paths of ranks, the most valuable first, each after its own beginning


def _paths(text: str) -> Choices:
    """Paths written a digit a rank: "0 00" is ((0,), (0, 0))."""
    return tuple(tuple(map(int, path)) for path in text.split())


# The published layout of 63 nodes, `mc_sim_7b_63`, which Medusa and FR-Spec use for all of their models.
PUBLISHED_63 = _paths(
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 40 21 004 005 "
    "0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 90 060 0001 16 070"
)


@struct.dataclass
class BlockParams:
    """A residual block: x + silu(weight x + bias)."""

    weight: Array  # [H, H]
    bias: Array  # [H]


@struct.dataclass
class HeadParams:
    """One Medusa head."""

    blocks: tuple[BlockParams, ...]
    lm_head: Array | None  # [V, H]; None where the target's reads the blocks' output


@struct.dataclass
class MedusaParams(DraftParams):
    """The weights of a Medusa draft, as they are stored."""

    heads: tuple[HeadParams, ...]


@struct.dataclass
class MedusaWeights(DraftWeights):
    """What Medusa reads when it drafts."""

    blocks: tuple[tuple[BlockParams, ...], ...]  # of each head
    lm_heads: tuple[DraftHead, ...]  # one a head, or a single one for all; the same ids in each


def residual(blocks: tuple[BlockParams, ...], x: Array) -> Array:
    """A head's residual blocks over features [T, H]."""
    for block in blocks:
        x = x + jax.nn.silu(linear(x, block.weight, block.bias))
    return x


def check_choices(choices: Choices, heads: int) -> None:
    """Refuse what is no tree.

    Raises:
      ValueError: a path comes before its own beginning, comes twice, or is longer than there are heads; or the
        first one is not [0], which any tree's bounds have room for.
    """
    if not 1 <= len(choices) < TREE_LIMIT:
        raise ValueError(f"a tree of {len(choices)} nodes below the root: 1 to {TREE_LIMIT - 1} are possible")
    if choices[0] != (0,):
        raise ValueError(f"the tree's first path is {list(choices[0])}; it must be [0]")
    seen: set[tuple[int, ...]] = {()}
    for path in choices:
        if path in seen or path[:-1] not in seen or min(path) < 0:
            raise ValueError(f"the tree's path {list(path)} comes twice, or before the path that it goes on from")
        if len(path) > heads:
            raise ValueError(f"the tree's path {list(path)} needs {len(path)} heads, and there are {heads}")
        seen.add(path)


def within(choices: Choices, tree: TreeConfig) -> Choices:
    """The first paths that respect a tree's size, depth and top-k: a path's beginning always comes before it."""
    kept = (path for path in choices if len(path) <= tree.depth and max(path) < tree.top_k)
    return tuple(path for path, _ in zip(kept, range(tree.size - 1), strict=False))


def skeleton(choices: Choices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parent [N] int32, depth [N] int32 and ancestor words [N, W] int32 of the tree with a root above `choices`."""
    number: dict[tuple[int, ...], int] = {(): 0}
    parent = np.zeros(len(choices) + 1, np.int32)
    visible = np.eye(len(choices) + 1, dtype=bool)
    for node, path in enumerate(choices, 1):
        number[path] = node
        parent[node] = number[path[:-1]]
        visible[node] |= visible[parent[node]]
    depth = visible.sum(-1, dtype=np.int32) - 1
    packed = np.packbits(np.pad(visible, ((0, 0), (0, -len(visible) % 32))), axis=-1, bitorder="little")
    return parent, depth, np.ascontiguousarray(packed).view("<i4")


@dataclasses.dataclass(frozen=True)
class Medusa(Memoryless):
    """Medusa as the engine sees it (`base.Drafter`): no memory, and nothing to take in but the last feature."""

    choices: Choices
    kernels: Kernels = AUTO

    def propose(
        self, weights: MedusaWeights, tree: TreeConfig, lead: Array, turn: Turn, memory: DraftMemory
    ) -> tuple[DraftTree, DraftMemory]:
        choices = within(self.choices, tree)
        parent, depth, ancestors = skeleton(choices)
        tokens = jnp.concatenate([turn.root[None], self._said(weights, choices, lead)[1]])
        return DraftTree(tokens, jnp.asarray(parent), jnp.asarray(depth), jnp.asarray(ancestors)), memory

    def offer(
        self,
        weights: MedusaWeights,
        tree: TreeConfig,
        lead: Array,
        turn: Turn,
        memory: DraftMemory,
        going: Going = ALL_THE_WAY,
    ) -> tuple[Candidates, Array, DraftMemory]:
        choices = self._offered(tree)
        parent, depth, _ = skeleton(choices)
        own, tokens = self._said(weights, choices, lead)
        paths: list[Array] = []
        for node, above in enumerate(parent[1:] - 1):
            score = going.likely(own[node], int(depth[1 + node]) - 1)
            paths.append(score if above < 0 else paths[above] + score)
        return Candidates(tokens, jnp.stack(paths), jnp.asarray(parent[1:] - 1)), jnp.int32(1), memory

    def by_level(self, tree: TreeConfig) -> tuple[int, ...]:
        return tuple(np.bincount([len(path) - 1 for path in self._offered(tree)]).tolist())

    def _offered(self, tree: TreeConfig) -> Choices:
        """The paths of a tree, a level after the other."""
        return tuple(sorted(within(self.choices, tree), key=len))

    def _said(self, weights: MedusaWeights, choices: Choices, lead: Array) -> tuple[Array, Array]:
        """What the heads say of each path's last token: its log-probability and its id, [C] each."""
        levels, ranks = max(map(len, choices)), 1 + max(max(path) for path in choices)
        with jax.named_scope("medusa_heads"):
            scores, rows = best_rows(weights, lead[None], levels, ranks, self.kernels)
        at = np.array([len(path) - 1 for path in choices]), np.array([path[-1] for path in choices])
        return scores[at], weights.lm_heads[0].ids[rows[at]]  # the only place where a row becomes an id


def best_rows(weights: MedusaWeights, feature: Array, levels: int, ranks: int, kernels: Kernels) -> tuple[Array, Array]:
    """The best `ranks` rows of the first `levels` heads, given a feature [1, H].

    Returns:
      Their log-probabilities, and which they are (int32): [levels, ranks] each.
    """
    outputs = [residual(blocks, feature.astype(blocks[0].weight.dtype)) for blocks in weights.blocks[:levels]]
    if len(weights.lm_heads) == 1:  # all heads read through one: a single product
        outputs = [jnp.concatenate(outputs)]
    best = [
        subvocab_top_k(rows, head.weight, ranks, head.scale, implementation=kernels.head)
        for rows, head in zip(outputs, weights.lm_heads, strict=False)
    ]
    scores, rows = zip(*best, strict=True)
    return jnp.concatenate(scores), jnp.concatenate(rows)


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """A Medusa draft (`base.DraftSpec`)."""

    hidden_size: int
    num_heads: int
    num_layers: int  # residual blocks a head
    own_lm_heads: bool
    choices: Choices  # the tree below the root

    kind: ClassVar[str] = "medusa"
    title: ClassVar[str] = "Medusa"
    crops: ClassVar[bool] = True
    in_context: ClassVar[bool] = False  # it remembers nothing, and each head has rows of its own
    taps: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.num_layers < 1:
            raise ValueError(f"{self.num_heads} heads of {self.num_layers} residual blocks: give at least one of each")
        check_choices(self.choices, self.num_heads)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return checked(cls, data, "its entries")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def copies(self, on: bool) -> Self:
        return no_copies(self, on)

    def shapes(self, target: ModelConfig, dtype: Any = np.float32) -> MedusaParams:
        hidden = self.hidden_size
        block = BlockParams(shapes.struct(dtype, hidden, hidden), shapes.struct(dtype, hidden))
        lm_head = shapes.struct(dtype, target.vocab_size, hidden) if self.own_lm_heads else None
        return MedusaParams((HeadParams((block,) * self.num_layers, lm_head),) * self.num_heads)

    def vocabulary(self, params: MedusaParams) -> None:
        return None

    def fit(self, tree: TreeConfig) -> TreeConfig:
        """As much of the draft's own tree as `tree` has room for."""
        return dataclasses.replace(tree, size=1 + len(within(self.choices, tree)))

    def fit_pace(self, pace: Pace, vocab: int) -> Pace:
        """All of the draft's own tree: its heads speak all at once, so that there is no level to end at."""
        paths = [path for path in self.choices if max(path) < vocab and len(path) <= pace.growth.depth]
        growth = TreeConfig(1 + len(paths), max(map(len, paths)), 1 + max(max(path) for path in paths))
        return dataclasses.replace(pace, growth=growth)

    def assemble(
        self,
        target: Target,
        params: MedusaParams,
        ids: np.ndarray,
        *,
        kernels: Kernels,
        int8: bool = False,
        slots: int = 0,
    ) -> tuple[Medusa, MedusaWeights]:
        assert not slots, "a Medusa draft has no slots"
        own = [h.lm_head for h in params.heads if h.lm_head is not None]
        lm_heads = tuple(crop(rows, ids, int8) for rows in own or [target.params.head])
        return Medusa(self.choices, kernels), MedusaWeights(tuple(h.blocks for h in params.heads), lm_heads)


def published_choices(heads: int) -> Choices:
    """The published tree, as deep as there are heads."""
    return tuple(path for path in PUBLISHED_63 if len(path) <= heads)


def as_choices(lists: Iterable[Iterable[int]]) -> Choices:
    """A tree that was read from JSON."""
    return tuple(tuple(int(rank) for rank in path) for path in lists)
