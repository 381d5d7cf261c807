"""EAGLE-2's way of drafting (arXiv 2406.16858), whichever layer predicts: take in true pairs, then grow by beams.

Pair t joins what the target made of the token at position t with the embedding of the token at t + 1.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Generic, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from frspec_jax import kv_cache
from frspec_jax.config import ModelConfig, TreeConfig
from frspec_jax.drafters.base import DraftMemory, DraftParams, DraftWeights, Turn
from frspec_jax.drafters.copying import Copies, Copying, NoCopies, NoCopying
from frspec_jax.kv_cache import LayerKV
from frspec_jax.layers import embedded
from frspec_jax.placement import Placement
from frspec_jax.sharding import AXIS, Split
from frspec_jax.slots import Slots
from frspec_jax.tree import ALL_THE_WAY, Beam, Candidates, DraftTree, Going, rerank
from frspec_jax.vocabulary import DraftHead, WholeHead
from pallas_kernels.dispatch import Kernels
from pallas_kernels.subvocab_head import Extra, subvocab_top_k


@struct.dataclass
class BeamWeights(DraftWeights):
    """What every drafter of this kind reads; its layer's own weights stand beside it in a subclass."""

    embedding: Array  # [V, H], the target's
    head: DraftHead  # cropped to the sub-vocabulary
    whole: WholeHead | None  # what copies and slots read; None where there are none


@struct.dataclass
class BeamMemory(DraftMemory):
    """What a drafter of one layer remembers between rounds."""

    kv: LayerKV
    slots: Slots | None = None  # None: its head is the sub-vocabulary alone


@struct.dataclass
class Frontier:
    """A tree in the making, where it grows next."""

    beam: Beam
    inputs: Array  # [K, H], what the layer reads for each beam beside its token
    kv: LayerKV
    copies: Copies | NoCopies
    levels: Array  # int32, grown so far


W = TypeVar("W", bound=BeamWeights)


class BeamDrafter(abc.ABC, Generic[W]):
    """A drafter (`base.Drafter`) of one decoder layer; a subclass says what the layer reads and what reads it."""

    config: ModelConfig  # the draft's layer, as a model of one layer
    kernels: Kernels
    copying: Copying | NoCopying
    slots: int  # M, how many ids of the text so far it may propose besides its sub-vocabulary
    split: Split | None  # how its layer is divided over a mesh, which `kernels.axis` then names; None: it is whole

    @abc.abstractmethod
    def fused(self, weights: W, features: Array) -> Array:
        """What the layer takes in, [T, H], of the target's features [T, (1 + taps) H]."""

    @abc.abstractmethod
    def extend(
        self, weights: W, embeddings: Array, features: Array, where: Placement, cache: LayerKV
    ) -> tuple[Array, LayerKV]:
        """Run T pairs through the layer: what it says [T, H], which is also what a pair after it takes in.

        embeddings: [T, H] of the tokens one position further on. features: [T, H], `fused` or predicted.
        """

    @abc.abstractmethod
    def head_input(self, weights: W, outputs: Array) -> Array:
        """What the LM head reads of the layer's outputs, both [T, H]."""

    def new_memory(self, capacity: int, dtype: jnp.dtype) -> BeamMemory:
        slots = Slots.empty(self.slots) if self.slots else None
        kv_heads = None if self.split is None else self.split.all_kv_heads
        return BeamMemory(kv_cache.empty(self.config, capacity, dtype, kv_heads)[0], slots)

    def divided(self, devices: int) -> Self:
        """The same with its layer divided among so many devices, as the target's layers are.

        All else of it each device has whole: to divide `fc` or the head would be one more exchange a pass, and of the
        head a sub-vocabulary leaves little.
        """
        split, kernels = Split(self.config, devices), dataclasses.replace(self.kernels, axis=AXIS)
        return dataclasses.replace(self, split=split, kernels=kernels)  # type: ignore[type-var]

    @property
    def reads_text(self) -> bool:
        return self.copying.reads_text

    def prefill(
        self, weights: W, features: Array, tokens: Array, start: Array, count: Array, memory: BeamMemory
    ) -> BeamMemory:
        memory = self._taken_in(weights, features, tokens[1:], start, memory)[1]
        if memory.slots is None:
            return memory
        slots = memory.slots.emptied(start == 0)  # they may be left from another text
        return dataclasses.replace(memory, slots=slots.seeing(tokens[:-1], start, count, weights.whole))

    def take_in(self, weights: W, turn: Turn, memory: BeamMemory) -> tuple[Array, BeamMemory]:
        accepted = turn.accepted
        with jax.named_scope("extend"):  # overwrites what the draft wrote for the last tree
            start = turn.length - accepted.count
            outputs, memory = self._taken_in(weights, accepted.features, accepted.next_tokens, start, memory)
        if memory.slots is not None:
            slots = memory.slots.seeing(accepted.next_tokens, start + 1, accepted.count, weights.whole)
            memory = dataclasses.replace(memory, slots=slots)
        return outputs[accepted.count - 1], memory

    def propose(
        self, weights: W, tree: TreeConfig, lead: Array, turn: Turn, memory: BeamMemory
    ) -> tuple[DraftTree, BeamMemory]:
        candidates, _, memory = self.offer(weights, tree, lead, turn, memory)
        with jax.named_scope("rerank"):
            return rerank(tree, candidates, turn.root), memory

    def by_level(self, tree: TreeConfig) -> tuple[int, ...]:
        return tree.top_k, *(tree.top_k**2,) * (tree.depth - 1)

    def each_pass(self, weights: W) -> tuple[Any, ...]:
        return self.layer_params(weights), weights.head

    @abc.abstractmethod
    def layer_params(self, weights: W) -> DraftParams:
        """The layer's own weights."""

    def passes(self, tree: TreeConfig) -> int:
        return tree.depth

    def within(self, rows: int) -> Self:
        return dataclasses.replace(self, kernels=dataclasses.replace(self.kernels, rows=rows))  # type: ignore[type-var]

    def offer(
        self,
        weights: W,
        tree: TreeConfig,
        lead: Array,
        turn: Turn,
        memory: BeamMemory,
        going: Going = ALL_THE_WAY,
    ) -> tuple[Candidates, Array, BeamMemory]:
        """Grow EAGLE-2's dynamic tree below the root.

        Level 0 reads the K best tokens off `lead` [H], the draft's output for the last committed pair; each further
        level runs the K beams through the draft, takes each one's K best tokens, and makes the K best of those K² the
        next beams.
        """
        whole, extra = weights.whole, None
        if memory.slots is not None:
            assert whole is not None
            whole, extra = whole.keeping(memory.slots.ids), memory.slots.head(whole)
        copies = self.copying.below_root(turn.text, turn.length, whole)
        with jax.named_scope("draft_level_0"):
            scores, tokens = copies.raised(*self._best_tokens(weights, tree, lead[None], extra))
            beam = Beam.start(tree, going.likely(scores[0], 0), tokens[0])
            inputs = jnp.broadcast_to(lead, (tree.top_k, lead.shape[0]))
            copies = copies.below(beam.tokens, jnp.zeros(tree.top_k, jnp.int32))
        at = Frontier(beam, inputs, memory.kv, copies, jnp.int32(1))
        for level in range(1, tree.depth):

            def deeper(ended: Frontier, level: int = level, at: Frontier = at) -> Frontier:
                beam = at.beam
                where = Placement.of_level(beam, level, turn.length)
                embeddings = embedded(weights.embedding, beam.tokens, self.config)
                outputs, kv = self.extend(weights, embeddings, at.inputs, where, ended.kv)
                scores, tokens = at.copies.raised(*self._best_tokens(weights, tree, outputs, extra))
                beam, parents = beam.grow(going.likely(scores, level), tokens, self.kernels.attention)
                copies = at.copies.below(beam.tokens, parents)
                return Frontier(beam, outputs[parents], kv, copies, at.levels + 1)

            with jax.named_scope(f"draft_level_{level}"):
                at = going.on(level, at.beam.scores, deeper, dataclasses.replace(at, beam=at.beam.ended()))
        return at.beam.history, at.levels, dataclasses.replace(memory, kv=at.kv)

    def _best_tokens(
        self, weights: W, tree: TreeConfig, outputs: Array, extra: Extra | None
    ) -> tuple[Array, Array, Array]:
        """What the head reads of outputs [M, H], and the K best tokens: log-probabilities and ids, [M, K] each."""
        with jax.named_scope("draft_head"):
            rows, head = self.head_input(weights, outputs), weights.head
            # The only place where a row of the sub-vocabulary becomes an id.
            return rows, *subvocab_top_k(
                rows, head.weight, tree.top_k, head.scale, head.ids, extra, implementation=self.kernels.head
            )

    def _taken_in(
        self, weights: W, features: Array, next_tokens: Array, start: Array, memory: BeamMemory
    ) -> tuple[Array, BeamMemory]:
        """Run pairs whose features are the target's own, at positions from `start` on."""
        inputs, embeddings = self.fused(weights, features), embedded(weights.embedding, next_tokens, self.config)
        where = Placement.chain(start, features.shape[0])
        outputs, kv = self.extend(weights, embeddings, inputs, where, memory.kv)
        return outputs, dataclasses.replace(memory, kv=kv)
