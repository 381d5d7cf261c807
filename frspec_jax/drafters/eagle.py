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
from frspec_jax.config import ModelConfig, TreeConfig
from frspec_jax.drafters.beam import BeamDrafter
from frspec_jax.drafters.copying import Copying
from frspec_jax.kv_cache import LayerKV
from frspec_jax.layers import LayerParams, decoder_layer, linear, rotation
from frspec_jax.vocabulary import DraftHead, crop
from pallas_kernels.dispatch import AUTO, Kernels


@struct.dataclass
class EagleParams:
    """The weights of an EAGLE draft."""

    fc: Array  # [H, 2 H]: the first H columns multiply the embedding, the rest the feature
    fc_bias: Array | None  # [H]
    layer: LayerParams  # without an attention norm


def extend(
    params: EagleParams,
    config: ModelConfig,
    embeddings: Array,
    features: Array,
    positions: Array,
    cache: LayerKV,
    write_at: Array,
    committed: Array,
    ancestors: Array,
    kernels: Kernels = AUTO,
) -> tuple[Array, LayerKV]:
    """Run T pairs through the draft.

    Args:
      config: `EagleConfig.layer_of(target)`.
      embeddings: [T, H] of the tokens at positions + 1; features: [T, H], the target's or predicted.
      positions: [T] int32. write_at, committed, ancestors: as in `decoder_layer`.

    Returns:
      Predicted features [T, H], and the cache.
    """
    with jax.named_scope("fc"):
        x = linear(jnp.concatenate([embeddings, features.astype(embeddings.dtype)], axis=-1), params.fc, params.fc_bias)
    by = rotation(config, positions)
    return decoder_layer(params.layer, config, x, by, cache, write_at, committed, ancestors, kernels)


@struct.dataclass
class EagleWeights:
    """Everything that EAGLE reads when it drafts, but for the target's embedding."""

    params: EagleParams
    head: DraftHead
    whole: Array | None = None  # [V, H], the target's LM head, where the draft copies: also from outside V'
    kept: Array | None = None  # [V] bool, which rows of it are in `head`


@dataclasses.dataclass(frozen=True)
class Eagle(BeamDrafter):
    """EAGLE-2 as the engine sees it (`base.Drafter`)."""

    config: ModelConfig  # the draft's one layer: `EagleConfig.layer_of(target)`
    kernels: Kernels = AUTO
    copying: Copying | None = None
    taps: ClassVar[tuple[int, ...]] = ()

    def fused(self, weights: EagleWeights, features: Array) -> Array:
        return features

    def extend(
        self,
        weights: EagleWeights,
        embeddings: Array,
        features: Array,
        positions: Array,
        cache: LayerKV,
        write_at: Array,
        committed: Array,
        ancestors: Array,
    ) -> tuple[Array, LayerKV]:
        return extend(
            weights.params, self.config, embeddings, features, positions, cache, write_at, committed, ancestors,
            self.kernels,
        )  # fmt: skip

    def head(self, weights: EagleWeights, outputs: Array) -> tuple[Array, DraftHead]:
        return outputs, weights.head

    def whole_head(self, weights: EagleWeights) -> tuple[Array, Array] | None:
        return None if weights.whole is None or weights.kept is None else (weights.whole, weights.kept)


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
        return dataclasses.replace(
            target,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=1,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.rms_norm_eps,
            attention_bias=self.attention_bias,
            output_bias=False,
            mlp_bias=False,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        known = {field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data}
        if known.get("copying") is not None:
            known["copying"] = Copying(**{name: float(figure) for name, figure in known["copying"].items()})
        return cls(**known)

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

    def assemble(
        self, target: ModelConfig, params: EagleParams, head: Array, ids: np.ndarray, *, kernels: Kernels, int8: bool
    ) -> tuple[Eagle, EagleWeights]:
        weights = EagleWeights(params, crop(head, ids, int8))
        if self.copying is not None:
            kept = np.isin(np.arange(target.vocab_size), ids)
            weights = dataclasses.replace(weights, whole=head, kept=jnp.asarray(kept))
        return Eagle(self.layer_of(target), kernels, self.copying), weights
