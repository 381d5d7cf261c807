"""The target: a model of Llama's kind as a pure function over a pytree of weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from frspec_jax.config import ModelConfig
from frspec_jax.kv_cache import KVCache
from frspec_jax.layers import LayerParams, Pass, decoder_layer, embedded
from frspec_jax.placement import Placement
from pallas_kernels import largest
from pallas_kernels.dispatch import AUTO, Kernels
from pallas_kernels.products import capped, rms_norm, rows_f32


@struct.dataclass
class LlamaParams:
    """The weights of a target."""

    embedding: Array  # [V, H]
    layers: tuple[LayerParams, ...]
    final_norm: Array  # [H]
    lm_head: Array | None  # [V, H]; None where it is tied to the embedding

    @property
    def head(self) -> Array:
        """The LM head's rows [V, H], whichever array holds them."""
        return self.embedding if self.lm_head is None else self.lm_head


def forward(
    params: LlamaParams,
    config: ModelConfig,
    tokens: Array,
    where: Placement,
    cache: KVCache,
    *,
    kernels: Kernels = AUTO,
    taps: tuple[int, ...] = (),
) -> tuple[Array, KVCache]:
    """Run T tokens through the target: a chunk of a prompt, one token, or a draft tree.

    Args:
      tokens: [T] int32. where: they stand; their keys and values are written to the cache there.
      kernels: which implementations run.
      taps: layers whose inputs are wanted too; the number of layers stands for the last one's output.

    Returns:
      Features [T, (1 + taps) H]: the hidden state after the final norm, which is the LM head's input, and
      beside it the residual stream at each tap. And the cache.
    """
    x = embedded(params.embedding, tokens, config)
    kinds = [config.kind(index) for index in range(config.num_layers)]
    passes = {kind: Pass.of(config, where, kernels, kind) for kind in dict.fromkeys(kinds)}
    updated = []
    streams = [x]  # what each layer reads
    for index, (layer, layer_cache) in enumerate(zip(params.layers, cache, strict=True)):
        with jax.named_scope(f"layer_{index}"):
            x, layer_cache = decoder_layer(layer, x, passes[kinds[index]], layer_cache)
        updated.append(layer_cache)
        streams.append(x)
    features = rms_norm(x, params.final_norm, config.rms_norm_eps, config.norm_offset)
    return jnp.concatenate([features, *(streams[tap] for tap in taps)], axis=-1), tuple(updated)


def logits(params: LlamaParams, config: ModelConfig, features: Array, axis: str | None = None) -> Array:
    """Full-vocabulary logits [T, V], float32, of features [T, H], which may have taps beside them.

    axis: of a mesh, over whose devices the head's rows are divided; all of them get all logits.
    """
    with jax.named_scope("lm_head"):
        scores = capped(rows_f32(features[:, : params.head.shape[1]], params.head), config.logits_cap)
        if axis is None:
            return scores
        return lax.all_gather(scores, axis, axis=1, tiled=True)[:, : config.vocab_size]


def likeliest(params: LlamaParams, config: ModelConfig, features: Array, axis: str) -> Array:
    """The greedy next token after each of features [T, H]: int32 [T]. Of each device one candidate goes to the others.

    Of equal logits the lowest id wins, as it does among all logits in one place.
    """
    with jax.named_scope("lm_head"):
        scores = rows_f32(features[:, : params.head.shape[1]], params.head)
        first = lax.axis_index(axis) * scores.shape[1]
        real = first + jnp.arange(scores.shape[1], dtype=jnp.int32) < config.vocab_size
        scores = jnp.where(real, scores, -jnp.inf)
        best = largest.argmax(scores)
        mine = jnp.take_along_axis(scores, best[:, None], 1)[:, 0]
        values, ids = lax.all_gather((mine, first.astype(jnp.int32) + best), axis)
        return jnp.take_along_axis(ids, lax.argmax(values, 0, jnp.int32)[None], 0)[0]
