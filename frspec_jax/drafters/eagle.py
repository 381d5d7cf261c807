"""EAGLE-2's draft: one decoder layer that predicts the target's next feature (arXiv 2401.15077, 2406.16858).

Pair t joins the target's feature at position t with the embedding of the token at t + 1, and its
output stands in for the target's feature at t + 1: the target's own LM head, cropped to the
sub-vocabulary, reads the next tokens off it (FR-Spec, arXiv 2502.14856). The embedding, the head
and the rotary embedding are the target's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from frspec_jax import shapes
from frspec_jax.config import ModelConfig, TreeConfig, check_layer
from frspec_jax.drafters.base import DraftParams, Target
from frspec_jax.drafters.beam import BeamDrafter, BeamWeights
from frspec_jax.drafters.copying import NO_COPYING, Copying, NoCopying
from frspec_jax.kv_cache import LayerKV
from frspec_jax.layers import LayerParams, Pass, decoder_layer, linear
from frspec_jax.pace import Pace
from frspec_jax.placement import Placement
from frspec_jax.schema import checked
from frspec_jax.sharding import Split
from frspec_jax.vocabulary import WholeHead, crop
from pallas_kernels.dispatch import AUTO, Kernels


@struct.dataclass
class EagleParams(DraftParams):
    """The weights of an EAGLE draft."""

    fc: Array  # [H, 2 H]: the first H columns multiply the embedding, the rest the feature
    fc_bias: Array | None  # [H]
    layer: LayerParams  # without an attention norm


@struct.dataclass
class EagleWeights(BeamWeights):
    """Everything that EAGLE reads when it drafts."""

    params: EagleParams


@dataclasses.dataclass(frozen=True)
class Eagle(BeamDrafter[EagleWeights]):
    """EAGLE-2 as the engine sees it (`base.Drafter`)."""

    config: ModelConfig  # the draft's one layer: `EagleConfig.layer_of(target)`
    kernels: Kernels = AUTO
    copying: Copying | NoCopying = NO_COPYING
    slots: int = 0
    split: Split | None = None
    taps: ClassVar[tuple[int, ...]] = ()

    def fused(self, weights: EagleWeights, features: Array) -> Array:
        return features

    def extend(
        self, weights: EagleWeights, embeddings: Array, features: Array, where: Placement, cache: LayerKV
    ) -> tuple[Array, LayerKV]:
        return run_pairs(weights.params, embeddings, features, Pass.of(self.config, where, self.kernels), cache)

    def head_input(self, weights: EagleWeights, outputs: Array) -> Array:
        return outputs

    def layer_params(self, weights: EagleWeights) -> EagleParams:
        return weights.params


def run_pairs(
    params: EagleParams, embeddings: Array, features: Array, here: Pass, cache: LayerKV
) -> tuple[Array, LayerKV]:
    """The draft's predicted features [T, H] of T pairs, and its cache.

    embeddings: [T, H] of the tokens one position further on. features: [T, H], the target's or predicted.
    """
    with jax.named_scope("fc"):
        x = linear(jnp.concatenate([embeddings, features.astype(embeddings.dtype)], axis=-1), params.fc, params.fc_bias)
    return decoder_layer(params.layer, x, here, cache)


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """An EAGLE draft (`base.DraftSpec`): one decoder layer on the target's features, sized freely but for H."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    fc_bias: bool = False
    attention_bias: bool = False
    copying: Copying | None = None  # how it copies, as fitted to it; None: not fitted

    kind: ClassVar[str] = "eagle"
    title: ClassVar[str] = "EAGLE-2"
    crops: ClassVar[bool] = True
    in_context: ClassVar[bool] = True
    taps: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        check_layer(self)

    @classmethod
    def like(cls, target: ModelConfig) -> EagleConfig:
        """A draft with the shape of one of the target's own layers: the published EAGLE recipe."""
        return cls(
            hidden_size=target.hidden_size,
            intermediate_size=target.intermediate_size,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            rms_norm_eps=target.rms_norm_eps,
            attention_bias=target.attention_bias,
        )

    def layer_of(self, target: ModelConfig) -> ModelConfig:
        """The draft's layer as a one-layer model that shares the target's rotary embedding."""
        return target.plain_layer(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.rms_norm_eps,
            attention_bias=self.attention_bias,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return checked(cls, data, "its entries")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def copies(self, on: bool) -> Self:
        return dataclasses.replace(self, copying=(self.copying or Copying()) if on else None)

    def shapes(self, target: ModelConfig, dtype: Any = np.float32) -> EagleParams:
        hidden = self.hidden_size
        return EagleParams(
            fc=shapes.struct(dtype, hidden, 2 * hidden),
            fc_bias=shapes.struct(dtype, hidden) if self.fc_bias else None,
            layer=shapes.layer_shapes(self.layer_of(target), dtype, attention_norm=False),
        )

    def vocabulary(self, params: EagleParams) -> None:
        return None

    def fit(self, tree: TreeConfig) -> TreeConfig:
        return tree

    def fit_pace(self, pace: Pace, vocab: int) -> Pace:
        return pace.with_beams(min(pace.growth.top_k, vocab))

    def assemble(
        self,
        target: Target,
        params: EagleParams,
        ids: np.ndarray,
        *,
        kernels: Kernels,
        int8: bool = False,
        slots: int = 0,
    ) -> tuple[Eagle, EagleWeights]:
        copying, head = self.copying or NO_COPYING, target.params.head
        weights = EagleWeights(
            embedding=target.params.embedding,
            head=crop(head, ids, int8),
            whole=WholeHead.of(head, ids) if self.copying or slots else None,
            params=params,
        )
        return Eagle(self.layer_of(target.config), kernels, copying, slots), weights
