"""EAGLE-2's draft tree (arXiv 2406.16858): beam history, global re-rank, and the accepted path.

Integers and scores only: no model stands here, so any drafter can grow a tree with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from frspec_jax.config import TreeConfig
from pallas_kernels.best_children import best_children
from pallas_kernels.dispatch import Implementation
from pallas_kernels.visibility import bit_words, constant_words


@struct.dataclass
class DraftTree:
    """N nodes, parents before children; node 0 is the root, the last emitted token."""

    tokens: Array  # [N] int32, full-vocabulary ids
    parent: Array  # [N] int32; the root is its own parent
    depth: Array  # [N] int32, 0 for the root
    ancestors: Array  # [N, words] int32, bit j: node j is this node or above it
    copied: Array | None = None  # [N] bool, nodes that were looked up in the text; None: all were drafted

    @classmethod
    def of_root(cls, root: Array) -> DraftTree:
        """The tree of vanilla decoding: the root alone."""
        zero = jnp.zeros((1,), jnp.int32)
        return cls(root[None], zero, zero, jnp.ones((1, 1), jnp.int32))

    def first(self, nodes: int) -> DraftTree:
        """The tree of its first nodes alone, which holds the parents of all of them."""
        copied = None if self.copied is None else self.copied[:nodes]
        ancestors = self.ancestors[:nodes, : -(-nodes // 32)]
        return DraftTree(self.tokens[:nodes], self.parent[:nodes], self.depth[:nodes], ancestors, copied)


@struct.dataclass
class Candidates:
    """C nodes that were proposed below a root. A parent has a lower number than its child, and is no less likely."""

    tokens: Array  # [C] int32, full-vocabulary ids
    scores: Array  # [C] float32, log-probability of the path from the root; -inf: no such node
    parent: Array  # [C] int32, a candidate's number; -1 for the root

    @classmethod
    def none(cls, count: int) -> Candidates:
        """As many that are not there."""
        zeros = jnp.zeros(count, jnp.int32)
        return cls(zeros, jnp.full(count, -jnp.inf, jnp.float32), zeros - 1)

    def with_more(self, tokens: Array, scores: Array, parent: Array) -> Candidates:
        """And others after them; parent: numbers among all."""
        return Candidates(
            tokens=jnp.concatenate([self.tokens, tokens]),
            scores=jnp.concatenate([self.scores, scores]),
            parent=jnp.concatenate([self.parent, parent]),
        )

    @property
    def count(self) -> int:
        return self.tokens.shape[0]


C = TypeVar("C")


class Going(Protocol):
    """How far a tree grows."""

    def likely(self, scores: Array, level: int) -> Array:
        """Log-probabilities [..., K] that the target agrees, of a draft's own for tokens `level` + 1 below the root."""

    def on(self, level: int, scores: Array, deeper: Callable[[C], C], ended: C) -> C:
        """What level `level` makes of a tree that has `ended` before it, if it goes on; scores: [K], of its beams."""


class AllTheWay:
    """EAGLE-2's own way: every level, and the draft is believed."""

    def likely(self, scores: Array, level: int) -> Array:
        return scores

    def on(self, level: int, scores: Array, deeper: Callable[[C], C], ended: C) -> C:
        return deeper(ended)


ALL_THE_WAY = AllTheWay()


@struct.dataclass
class Beam:
    """The frontier of a growing tree, and every candidate proposed so far.

    Candidates are numbered as they are proposed: K at level 1, then K² a level, K for each beam.
    """

    tokens: Array  # [K] the beams' tokens
    scores: Array  # [K] float32, cumulative log-probability under the draft
    number: Array  # [K] the beams' numbers among the candidates
    visible: Array  # [K, words] int32 bit words over the draft's tree rows: those that each beam sees, its own included
    history: Candidates  # all so far

    @classmethod
    def start(cls, tree: TreeConfig, scores: Array, tokens: Array) -> Beam:
        """The first K candidates: children of the root. They will be the draft's tree rows 0 .. K-1."""
        k = tree.top_k
        number = jnp.arange(k, dtype=jnp.int32)
        return cls(
            tokens=tokens,
            scores=scores,
            number=number,
            visible=_own_rows(tree.draft_rows, k, 0),
            history=Candidates(tokens, scores, jnp.full((k,), -1, jnp.int32)),
        )

    def grow(self, scores: Array, tokens: Array, implementation: Implementation = "auto") -> tuple[Beam, Array]:
        """Give each beam K children and keep the K best of all.

        Args:
          scores: [K, K] float32, log-probability of each child given its beam. tokens: [K, K].

        Returns:
          The next beam, and [K] which of the present beams each new one descends from.
        """
        k = tokens.shape[0]
        first = self.history.count  # the number of the first child
        level = (first - k) // (k * k) + 1  # levels whose rows the draft has written by now
        own = _own_rows(32 * self.visible.shape[1], k, level * k)
        best = best_children(self.scores, scores, tokens, self.visible, own, implementation=implementation)
        return Beam(
            tokens=best.tokens,
            scores=best.scores,
            number=first + best.number,
            visible=best.sees,
            history=self.history.with_more(tokens.reshape(-1), best.every, jnp.repeat(self.number, k)),
        ), best.number // k

    def ended(self) -> Beam:
        """A beam of the next level's shape that nothing grows on."""
        k = self.tokens.shape[0]
        none = Candidates.none(k * k)
        history = self.history.with_more(none.tokens, none.scores, none.parent)
        return dataclasses.replace(self, scores=jnp.full_like(self.scores, -jnp.inf), history=history)


def _own_rows(rows: int, k: int, first: int) -> Array:
    """Bit words [K, words] over `rows` rows of the draft's tree, each beam's own row alone, from `first` on."""
    return constant_words(np.eye(k, rows, first, dtype=bool))


def rerank(tree: TreeConfig, candidates: Candidates, root: Array) -> DraftTree:
    """Keep the N - 1 candidates of highest cumulative score, in the order in which they were proposed.

    A child's score never exceeds its parent's, and a tie goes to the earlier candidate, so the kept
    set holds every kept node's parent, and parents precede children.
    """
    number = jnp.arange(candidates.count, dtype=jnp.int32)
    earlier = number[None] < number[:, None]
    stays = _rank(candidates) < tree.size - 1  # [C]
    place = (earlier & stays[None]).sum(-1)  # [C] how many before it stay
    return _kept(tree, candidates, root, stays, place)[0]


def best_first(tree: TreeConfig, candidates: Candidates, root: Array) -> tuple[DraftTree, Array]:
    """The same tree in the order of its scores, so that its first n nodes are the tree of size n; and which they are.

    Returns:
      The tree, and the numbers [N-1] of the candidates that it keeps.
    """
    place = _rank(candidates)
    return _kept(tree, candidates, root, place < tree.size - 1, place)


def _rank(candidates: Candidates) -> Array:
    """How many candidates go before each one, [C]: those of a higher score, and of equal ones the earlier."""
    # Counting stands in for sorting: every candidate against every other is a few hundred thousand comparisons
    # in two or three fused loops, where two sorts and a binary search are a chain of small kernels on a GPU.
    scores, number = candidates.scores, jnp.arange(candidates.count, dtype=jnp.int32)
    earlier = number[None] < number[:, None]
    return ((scores[None] > scores[:, None]) | ((scores[None] == scores[:, None]) & earlier)).sum(-1)


def _kept(tree: TreeConfig, candidates: Candidates, root: Array, stays: Array, place: Array) -> tuple[DraftTree, Array]:
    """The tree of those that stay, [C] bool, each at its `place` [C] among them."""
    places = jnp.arange(tree.size - 1)
    kept = jnp.argmax(stays[None] & (place[None] == places[:, None]), axis=-1)  # [N-1] candidate numbers
    above = candidates.parent[kept]  # [N-1] candidate numbers, -1 for the root
    parent = jnp.where(above < 0, 0, place[above] + 1).astype(jnp.int32)
    parent = jnp.concatenate([jnp.zeros((1,), jnp.int32), parent])
    tokens = jnp.concatenate([root[None], candidates.tokens[kept]])
    ancestors = own = constant_words(np.eye(tree.size, dtype=bool))
    for _ in range(tree.depth):
        ancestors = own | ancestors[parent]
    depth = lax.population_count(ancestors).sum(-1) - 1
    return DraftTree(tokens, parent, depth, ancestors), kept


def within_blocks(path: Array, drafts: Array, start: Array, block: int) -> Array:
    """How many drafts of a path may stay, int32: those that stand in the block of rows to which they will move.

    Where sums over a cache's rows begin anew at every block, a node rounds as in decoding token by token only if each
    node above it, and itself, is in the same block before and after it moves to its place in the text.

    path: [D+1] node indices by depth, the root first. drafts: how many after it are accepted. start: the root's row.
    """
    depth = jnp.arange(path.shape[0], dtype=jnp.int32)
    alike = (start + path) // block == (start + depth) // block
    return jnp.minimum(drafts, jnp.cumprod(alike, dtype=jnp.int32).sum(dtype=jnp.int32) - 1)


def accepted_path(draft: DraftTree, chosen: Array, max_depth: int, besides: Array | None = None) -> tuple[Array, Array]:
    """The longest path from the root whose every token is the one that the target chose above it.

    Siblings carry distinct tokens, so at most one child of a node is right and the path is unique.

    Args:
      chosen: [N] int32, the target's token after each node.
      besides: [N] bool, nodes that count as right though nobody chose them (lossy); of several longest paths
        the one drafted first is taken.

    Returns:
      path: [D+1] node indices by depth, the root first, 0 past the end; and its depth, int32.
    """
    with jax.named_scope("accept"):
        nodes = jnp.arange(draft.tokens.shape[0])
        right = (draft.tokens == chosen[draft.parent]) | (nodes == 0)
        right = right if besides is None else right | besides
        accepted = ((draft.ancestors & ~bit_words(right)) == 0).all(-1)
        deepest = jnp.argmax(jnp.where(accepted, draft.depth, -1))
        words = draft.ancestors[deepest]
        on_path = ((words[nodes >> 5] >> (nodes & 31)) & 1).astype(bool)
        steps = jnp.arange(max_depth + 1, dtype=jnp.int32)
        path = jnp.where(on_path & (draft.depth == steps[:, None]), nodes, 0).sum(-1, dtype=jnp.int32)
        return path, draft.depth[deepest]
