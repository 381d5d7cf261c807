"""EAGLE-3's draft: one decoder layer on features from three depths of the target (arXiv 2503.01840).

It drafts as EAGLE-2 does, with another layer: `fc` joins the residual stream of three of the target's
layers into what pair t takes in; Q, K and V read its normed embedding and this side by side; and a norm
and an LM head of its own, over a vocabulary that was cropped when it was trained, read its output. That
head is cropped further to the sub-vocabulary (FR-Spec, arXiv 2502.14856). Drafts of vLLM's trainers (speculators)
may norm in further places (`Norms`), and bring a token embedding of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from frspec_jax import shapes
from frspec_jax.config import ModelConfig, RopeScaling, TreeConfig, check_layer
from frspec_jax.drafters.base import DraftParams, Target, no_copies
from frspec_jax.drafters.beam import BeamDrafter, BeamWeights
from frspec_jax.drafters.copying import NO_COPYING, NoCopying
from frspec_jax.errors import UserError
from frspec_jax.kv_cache import LayerKV
from frspec_jax.layers import LayerParams, Pass, decoder_layer
from frspec_jax.pace import Pace
from frspec_jax.placement import Placement
from frspec_jax.schema import checked
from frspec_jax.sharding import Split
from frspec_jax.vocabulary import WholeHead, crop
from pallas_kernels.dispatch import AUTO, Kernels
from pallas_kernels.products import linear, rms_norm


@struct.dataclass
class Eagle3Params(DraftParams):
    """The weights of an EAGLE-3 draft."""

    fc: Array  # [H, 3 H], over the taps in their order
    fc_bias: Array | None  # [H]
    embedding_norm: Array  # [H]
    feature_norm: Array  # [H]
    layer: LayerParams  # whose Q, K and V read 2 H, embedding first, and which has no attention norm
    norm: Array  # [H], before the head
    lm_head: Array | None  # [V_d, H]; None once it has been cropped
    ids: Array | None  # [V_d] int32, what the head's rows stand for


@struct.dataclass
class Eagle3OwnParams(Eagle3Params):
    """The weights of a draft whose token embedding was trained too."""

    embedding: Array  # [V, H]


@dataclasses.dataclass(frozen=True)
class Norms:
    """Where a draft norms besides the published places."""

    residual: bool = False  # the layer's residual stream is the normed feature, not the feature as it came
    # What fc reads: the taps as they are, normed as one row or each by itself. The learned weights of these norms
    # are not kept: each scales a column of fc, and stands in it.
    taps: Literal["none", "joined", "each"] = "none"
    output: bool = False  # the next pair takes in what the head reads, not the layer's output before the last norm


AS_PUBLISHED = Norms()


@struct.dataclass
class Eagle3Weights(BeamWeights):
    """Everything that EAGLE-3 reads when it drafts."""

    params: Eagle3Params  # without its lm_head and ids


@dataclasses.dataclass(frozen=True)
class Eagle3(BeamDrafter[Eagle3Weights]):
    """EAGLE-3 as the engine sees it (`base.Drafter`)."""

    config: ModelConfig  # the draft's one layer: `Eagle3Config.layer_of(target)`
    taps: tuple[int, ...]
    kernels: Kernels = AUTO
    norms: Norms = AS_PUBLISHED
    copying: NoCopying = NO_COPYING  # its head cannot read what lies outside its vocabulary
    slots: int = 0
    split: Split | None = None

    def fused(self, weights: Eagle3Weights, features: Array) -> Array:
        return joined_taps(weights.params, self.norms, features, self.config.rms_norm_eps)

    def extend(
        self, weights: Eagle3Weights, embeddings: Array, features: Array, where: Placement, cache: LayerKV
    ) -> tuple[Array, LayerKV]:
        params, eps = weights.params, self.config.rms_norm_eps
        attend_from, x = entered(params, self.norms, rms_norm(embeddings, params.embedding_norm, eps), features, eps)
        here = Pass.of(self.config, where, self.kernels)
        x, cache = decoder_layer(params.layer, x, here, cache, attend_from=attend_from)
        return left(params, self.norms, x, eps), cache

    def head_input(self, weights: Eagle3Weights, outputs: Array) -> Array:
        return read_by_head(weights.params, self.norms, outputs, self.config.rms_norm_eps)

    def layer_params(self, weights: Eagle3Weights) -> Eagle3Params:
        return weights.params


# The places where a draft norms, in the order in which a pair comes by them. Training runs the same ones.


def joined_taps(params: Eagle3Params, norms: Norms, features: Array, eps: float) -> Array:
    """What pair t takes in, [T, H], of the target's features [T, (1 + taps) H]."""
    with jax.named_scope("fc"):
        hidden = params.fc.shape[0]
        taps = features[:, hidden:].astype(params.fc.dtype)  # the target's final feature stands before them
        if norms.taps != "none":
            width = hidden if norms.taps == "each" else taps.shape[1]
            rows = taps.reshape(-1, width)
            taps = rms_norm(rows, jnp.ones(width, rows.dtype), eps).reshape(taps.shape)
        return linear(taps, params.fc, params.fc_bias)


def entered(params: Eagle3Params, norms: Norms, embeddings: Array, features: Array, eps: float) -> tuple[Array, Array]:
    """What Q, K and V read [T, 2 H], and the residual stream [T, H], of normed embeddings and of features [T, H]."""
    normed = rms_norm(features, params.feature_norm, eps)
    return jnp.concatenate([embeddings, normed], axis=-1), normed if norms.residual else features


def left(params: Eagle3Params, norms: Norms, outputs: Array, eps: float) -> Array:
    """What the layer's outputs [T, H] are to the next pair."""
    return rms_norm(outputs, params.norm, eps) if norms.output else outputs


def read_by_head(params: Eagle3Params, norms: Norms, outputs: Array, eps: float) -> Array:
    """What the head reads of them, [T, H] as `left` gives it."""
    return outputs if norms.output else rms_norm(outputs, params.norm, eps)


def default_taps(layers: int) -> tuple[int, int, int]:
    """The layers whose inputs the published drafts read: the third, the middle one, and the last but two."""
    return 2, layers // 2, layers - 3


@dataclasses.dataclass(frozen=True)
class Eagle3Config:
    """An EAGLE-3 draft (`base.DraftSpec`)."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float  # its own: it may differ from the target's
    rope_scaling: RopeScaling
    draft_vocab_size: int  # V_d
    taps: tuple[int, ...]
    fc_bias: bool = False
    attention_bias: bool = False
    norms: Norms = AS_PUBLISHED
    own_embedding: bool = False  # it was trained with a token embedding of its own, which is not the target's

    kind: ClassVar[str] = "eagle3"
    title: ClassVar[str] = "EAGLE-3"
    crops: ClassVar[bool] = True
    in_context: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_layer(self, "draft_vocab_size")
        if not self.taps or min(self.taps) < 0:
            raise UserError(f"config.json: taps is {list(self.taps)}, and must name layers of the target")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return checked(cls, data, "its entries")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def copies(self, on: bool) -> Self:
        return no_copies(self, on)

    def layer_of(self, target: ModelConfig) -> ModelConfig:
        """The draft's layer as a one-layer model, with its own rotary embedding."""
        own = (
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "rms_norm_eps",
            "rope_theta",
            "rope_scaling",
            "attention_bias",
        )
        # Its embeddings go through a norm: their size does not matter.
        return target.plain_layer(embedding_scale=1.0, **{name: getattr(self, name) for name in own})

    def shapes(self, target: ModelConfig, dtype: Any = np.float32) -> Eagle3Params:
        hidden = self.hidden_size
        norm = shapes.struct(dtype, hidden)
        params = Eagle3Params(
            fc=shapes.struct(dtype, hidden, len(self.taps) * hidden),
            fc_bias=norm if self.fc_bias else None,
            embedding_norm=norm,
            feature_norm=norm,
            layer=shapes.layer_shapes(self.layer_of(target), dtype, attention_norm=False, inputs=2 * hidden),
            norm=norm,
            lm_head=shapes.struct(dtype, self.draft_vocab_size, hidden),
            ids=shapes.struct(np.int32, self.draft_vocab_size),
        )
        return with_embedding(params, shapes.struct(dtype, target.vocab_size, hidden) if self.own_embedding else None)

    def vocabulary(self, params: Eagle3Params) -> np.ndarray:
        return np.asarray(params.ids)

    def fit(self, tree: TreeConfig) -> TreeConfig:
        return tree

    def fit_pace(self, pace: Pace, vocab: int) -> Pace:
        return pace.with_beams(min(pace.growth.top_k, vocab))

    def assemble(
        self,
        target: Target,
        params: Eagle3Params,
        ids: np.ndarray,
        *,
        kernels: Kernels,
        int8: bool = False,
        slots: int = 0,
    ) -> tuple[Eagle3, Eagle3Weights]:
        """See `base.DraftSpec`; the head that is cropped is the draft's own, so `ids` must be among its vocabulary."""
        known = self.vocabulary(params)
        order = np.argsort(known)
        rows = order[np.searchsorted(known, ids, sorter=order)]
        params, embedding = without_embedding(params)
        assert params.lm_head is not None
        weights = Eagle3Weights(
            embedding=target.params.embedding if embedding is None else embedding,
            head=dataclasses.replace(crop(params.lm_head, rows, int8), ids=jnp.asarray(ids, jnp.int32)),
            whole=_whole_head(params.lm_head, known, ids, target.config.vocab_size) if slots else None,
            params=dataclasses.replace(params, lm_head=None, ids=None),
        )
        drafter = Eagle3(self.layer_of(target.config), self.taps, kernels, self.norms, slots=slots)
        return drafter, weights


def _whole_head(lm_head: Array, known: np.ndarray, kept: np.ndarray, vocab_size: int) -> WholeHead:
    """The draft's own head, whose rows stand for the ids `known` [V_d], and of which it keeps `kept` [V']."""
    rows = np.full(vocab_size, -1, np.int32)
    rows[known] = np.arange(len(known))
    return WholeHead(lm_head, jnp.asarray(np.isin(np.arange(vocab_size), kept)), jnp.asarray(rows))


def with_embedding(params: Eagle3Params, embedding: Any) -> Eagle3Params:
    """The weights with a token embedding of their own [V, H]; None: without."""
    if embedding is None:
        return params
    return Eagle3OwnParams(**_fields(params), embedding=embedding)


def without_embedding(params: Eagle3Params) -> tuple[Eagle3Params, Array | None]:
    """The weights, and the token embedding of their own that they may have, apart."""
    return Eagle3Params(**_fields(params)), params.embedding if isinstance(params, Eagle3OwnParams) else None


def _fields(params: Eagle3Params) -> dict[str, Any]:
    return {field.name: getattr(params, field.name) for field in dataclasses.fields(Eagle3Params)}
