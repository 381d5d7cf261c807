"""EAGLE-2's way of drafting (arXiv 2406.16858), whichever layer predicts: take in true pairs, then grow by beams.

Pair t joins what the target made of the token at position t with the embedding of the token at t + 1.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from frspec_jax import kv_cache
from frspec_jax.config import ModelConfig, TreeConfig
from frspec_jax.drafters import copying
from frspec_jax.drafters.base import Accepted
from frspec_jax.drafters.copying import Copying, DraftCache
from frspec_jax.kv_cache import LayerKV
from frspec_jax.tree import Beam, DraftTree, rerank
from frspec_jax.vocabulary import DraftHead
from pallas_kernels.dispatch import Kernels
from pallas_kernels.products import einsum_f32, take_rows
from pallas_kernels.subvocab_head import subvocab_top_k
from pallas_kernels.visibility import bit_words, causal


class BeamDrafter(abc.ABC):
    """A drafter (`base.Drafter`) of one decoder layer; a subclass says what the layer reads and what reads it."""

    config: ModelConfig  # the draft's layer, as a model of one layer
    kernels: Kernels
    copying: Copying | None

    @abc.abstractmethod
    def fused(self, weights: Any, features: Array) -> Array:
        """What the layer takes in, [T, H], of the target's features [T, (1 + taps) H]."""

    @abc.abstractmethod
    def extend(
        self,
        weights: Any,
        embeddings: Array,
        features: Array,
        positions: Array,
        cache: LayerKV,
        write_at: Array,
        committed: Array,
        ancestors: Array,
    ) -> tuple[Array, LayerKV]:
        """Run T pairs through the layer: what it says [T, H], which is also what a pair after it takes in.

        embeddings: [T, H] of the tokens at positions + 1. features: [T, H], `fused` or predicted.
        write_at, committed, ancestors: as in `layers.decoder_layer`.
        """

    @abc.abstractmethod
    def head(self, weights: Any, outputs: Array) -> tuple[Array, DraftHead]:
        """What the LM head reads of the layer's outputs, both [T, H]; and the head, cropped to the sub-vocabulary."""

    def whole_head(self, weights: Any) -> tuple[Array, Array] | None:
        """The head [V, H] before it was cropped, and [V] which of its rows were kept; None: this one does not copy."""
        return None

    def new_cache(self, capacity: int, dtype: jnp.dtype) -> DraftCache:
        return DraftCache.new(kv_cache.empty(self.config, capacity, dtype)[0], self.copying is not None)

    def prefill(
        self, weights: Any, embedding: Array, features: Array, next_tokens: Array, start: Array, cache: DraftCache
    ) -> DraftCache:
        return self._extend(weights, embedding, features, next_tokens, start, cache)[1]

    def propose(
        self,
        weights: Any,
        embedding: Array,
        tree: TreeConfig,
        accepted: Accepted,
        root: Array,
        length: Array,
        cache: DraftCache,
    ) -> tuple[DraftTree, DraftCache]:
        with jax.named_scope("extend"):  # overwrites what the draft wrote for the last tree
            start = length - accepted.count
            outputs, cache = self._extend(weights, embedding, accepted.features, accepted.next_tokens, start, cache)
        return self.grow(weights, embedding, tree, outputs[accepted.count - 1], root, length, cache)

    def grow(
        self,
        weights: Any,
        embedding: Array,
        tree: TreeConfig,
        feature: Array,
        root: Array,
        committed: Array,
        cache: DraftCache,
    ) -> tuple[DraftTree, DraftCache]:
        """Grow EAGLE-2's dynamic tree below the root, then keep its best `tree.size` nodes.

        Level 0 reads the K best tokens off `feature`; each further level runs the K beams through the
        draft, takes each one's K best tokens, and makes the K best of those K² the next beams.

        Args:
          embedding: [V, H], the target's. feature: [H], the draft's output for the last committed pair.
          root: int32 scalar, the last emitted token. committed: int32 scalar, pairs in the cache.
        """
        k, kv = tree.top_k, cache.kv

        def best_tokens(outputs: Array, last: Array | None, level: int) -> tuple[Array, Array]:
            with jax.named_scope("draft_head"):
                rows, head = self.head(weights, outputs)
                scores, index = subvocab_top_k(rows, head.weight, k, head.scale, implementation=self.kernels.head)
                tokens = head.ids[index]  # the only place where a sub-vocabulary index becomes an id
            if whole is None or last is None:
                return scores, tokens
            with jax.named_scope("copy"):
                return self._with_copies(whole, cache, rows, scores, tokens, last, committed, level)

        whole = self.whole_head(weights)
        last = None if whole is None or cache.tokens is None else copying.recent(cache.tokens, committed)[None]
        with jax.named_scope("draft_level_0"):
            scores, tokens = best_tokens(feature[None], last, 0)
            beam = Beam.start(tree, scores[0], tokens[0])
            inputs = jnp.broadcast_to(feature, (k, feature.shape[0]))
        parents = jnp.zeros(k, jnp.int32)  # rows of `last`, which tells each beam's last tokens
        for level in range(1, tree.depth):
            with jax.named_scope(f"draft_level_{level}"):
                positions = jnp.broadcast_to(committed + level - 1, (k,))
                write_at, visible = committed + (level - 1) * k, bit_words(beam.visible)
                outputs, kv = self.extend(
                    weights, take_rows(embedding, beam.tokens), inputs, positions, kv, write_at, committed, visible
                )
                last = None if last is None else jnp.column_stack([beam.tokens, last[parents, :-1]])
                scores, tokens = best_tokens(outputs, last, level)
                beam, parents = beam.grow(scores, tokens)
                inputs = outputs[parents]
        with jax.named_scope("rerank"):
            return rerank(tree, beam, root), dataclasses.replace(cache, kv=kv)

    def _with_copies(
        self,
        whole: tuple[Array, Array],
        cache: DraftCache,
        rows: Array,
        scores: Array,
        tokens: Array,
        last: Array,
        length: Array,
        level: int,
    ) -> tuple[Array, Array]:
        """The best tokens [M, K] of beams, and their log-probabilities, after what stands in the text has risen.

        Args:
          whole: of `whole_head`. rows: [M, H], what the head reads. scores, tokens: [M, K], its best.
          last: [M, LONGEST], each beam's last tokens. length: int32 scalar, the root's position.
          level: how far below the root the beams stand.
        """
        assert self.copying is not None and cache.tokens is not None
        head, kept = whole
        here = jnp.broadcast_to(length + level, last.shape[:1])
        follows, longest, age = copying.followers(cache.tokens, length, last, here)
        rise = copying.rises(self.copying, follows, copying.weighed(self.copying, longest, age))
        # The best token's score and its logit tell what the logits have to be lowered by.
        asked = jnp.concatenate([tokens[:, :1], jnp.maximum(follows, 0)], axis=-1)
        said = einsum_f32("mh,mch->mc", rows, take_rows(head, asked).astype(rows.dtype))
        said = said[:, 1:] - said[:, :1] + scores[:, :1]
        return copying.raised(scores, tokens, follows, said, kept[jnp.maximum(follows, 0)], rise)

    def _extend(
        self, weights: Any, embedding: Array, features: Array, next_tokens: Array, start: Array, cache: DraftCache
    ) -> tuple[Array, DraftCache]:
        """Run pairs whose features are the target's own, at positions from `start` on."""
        pairs = features.shape[0]
        positions = start + jnp.arange(pairs, dtype=jnp.int32)
        inputs = self.fused(weights, features)
        outputs, kv = self.extend(
            weights, take_rows(embedding, next_tokens), inputs, positions, cache.kv, start, start, causal(pairs)
        )
        return outputs, dataclasses.replace(cache, kv=kv).noted(next_tokens, start)
