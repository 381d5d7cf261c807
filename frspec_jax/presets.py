"""Published models by their sizes, and random weights of those sizes: to measure a speed needs no checkpoint."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from frspec_jax.config import ModelConfig, RopeScaling
from frspec_jax.drafters.eagle import Eagle, EagleConfig, EagleParams, EagleWeights
from frspec_jax.engine import DecodeState, Plan, Weights, new_caches, state_after
from frspec_jax.layers import LayerParams
from frspec_jax.llama import LlamaParams
from frspec_jax.vocabulary import crop
from pallas_kernels.dispatch import AUTO, Kernels
from pallas_kernels.shapes import SHAPES, Shape

SPREAD = 0.02  # standard deviation of random weights


def model_config(name: str) -> ModelConfig:
    """The target of a name in `pallas_kernels.shapes.SHAPES`."""
    return config_of(SHAPES[name], qwen=name.startswith("qwen"))


def config_of(shape: Shape, qwen: bool = False) -> ModelConfig:
    """A target of these sizes; what does not change the speed is Llama 3's."""
    return ModelConfig(
        architecture="qwen2" if qwen else "llama",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(),
        max_context=8192,
        tied_head=shape.tied_head,
        attention_bias=qwen,
    )


def eagle_of(config: ModelConfig, kernels: Kernels = AUTO) -> Eagle:
    """An EAGLE drafter with the shape of one of the target's layers, as the published heads have it."""
    return Eagle(EagleConfig.like(config).layer_of(config), kernels)


def state_at(plan: Plan, length: Array, capacity: int, dtype: jnp.dtype) -> DecodeState:
    """A state `length` tokens into a text of zeros: a round from it costs what any other of that length does."""
    caches = new_caches(plan, capacity, dtype)
    feature, root = jnp.zeros(plan.config.hidden_size, dtype), jnp.int32(0)
    return state_after(plan, caches, feature, root, length, jnp.int32(capacity))


def random_weights(config: ModelConfig, draft_vocab: int | None, dtype: jnp.dtype, key: Array) -> Weights:
    """Random weights for a target, and for an EAGLE draft whose head keeps `draft_vocab` rows (None: no draft)."""
    keys = iter(jax.random.split(key, 16 * (config.num_layers + 2)))

    def normal(*shape: int) -> Array:
        return SPREAD * jax.random.normal(next(keys), shape, dtype)

    def layer(of: ModelConfig, norm: bool) -> LayerParams:
        hidden, heads, width = of.hidden_size, of.num_heads * of.head_dim, of.head_dim
        qkv = heads + 2 * of.num_kv_heads * width
        return LayerParams(
            attention_norm=jnp.ones(hidden, dtype) if norm else None,
            qkv=normal(qkv, hidden),
            qkv_bias=normal(qkv) if of.attention_bias else None,
            output=normal(hidden, heads),
            output_bias=None,
            mlp_norm=jnp.ones(hidden, dtype),
            gate_up=normal(2 * of.intermediate_size, hidden),
            gate_up_bias=None,
            down=normal(hidden, of.intermediate_size),
            down_bias=None,
        )

    target = LlamaParams(
        embedding=normal(config.vocab_size, config.hidden_size),
        layers=tuple(layer(config, True) for _ in range(config.num_layers)),
        final_norm=jnp.ones(config.hidden_size, dtype),
        lm_head=None if config.tied_head else normal(config.vocab_size, config.hidden_size),
    )
    if draft_vocab is None:
        return Weights(target, ())
    of = eagle_of(config).config
    params = EagleParams(normal(config.hidden_size, 2 * config.hidden_size), None, layer(of, False))
    return Weights(target, EagleWeights(params, crop(target.head, np.arange(draft_vocab))))
