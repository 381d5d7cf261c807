"""Published models by their sizes, and random weights of those sizes: to measure a speed needs no checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from frspec_jax.config import ModelConfig, RopeScaling, Sampling
from frspec_jax.drafters.base import NO_WEIGHTS
from frspec_jax.drafters.eagle import Eagle, EagleConfig, EagleWeights
from frspec_jax.families import BY_NAME, windows_of
from frspec_jax.plan import Plan
from frspec_jax.shapes import model_shapes
from frspec_jax.state import Asked, DecodeState, Weights, new_caches, state_after
from frspec_jax.vocabulary import WholeHead, crop
from pallas_kernels.dispatch import AUTO, Kernels
from pallas_kernels.models import SHAPES, Shape

WINDOW = 512  # of a family whose layers have one
SPREAD = 0.02  # standard deviation of random weights


def model_config(name: str) -> ModelConfig:
    """The target of a name in `pallas_kernels.models.SHAPES`."""
    return config_of(SHAPES[name], family_of(name))


def family_of(name: str) -> str:
    """The family of such a model."""
    return next((family for family in BY_NAME if name.startswith(family)), "llama")


def config_of(shape: Shape, family: str = "llama") -> ModelConfig:
    """A target of these sizes; what does not change the speed is Llama 3's."""
    row = BY_NAME[family]
    windows = windows_of(WINDOW, shape.layers, row.window_every) if row.window_every else ()
    return ModelConfig(
        architecture=family,
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
        attention_bias=row.attention_bias == "qkv",
        **row.arithmetic(shape.hidden),
        windows=windows,
        local_rope_theta=row.local_rope_theta,
    )


def eagle_of(config: ModelConfig, kernels: Kernels = AUTO, slots: int = 0) -> Eagle:
    """An EAGLE drafter with the shape of one of the target's layers, as the published heads have it."""
    return Eagle(EagleConfig.like(config).layer_of(config), kernels, slots=slots)


def state_at(plan: Plan, length: Array, capacity: int, dtype: jnp.dtype) -> DecodeState:
    """A state `length` tokens into a text of zeros: a round from it costs what any other of that length does."""
    caches = new_caches(plan, capacity, dtype)
    feature, root = jnp.zeros(plan.config.hidden_size, dtype), jnp.int32(0)
    return state_after(plan, caches, feature, root, length, Asked.of(Sampling(), seed=0, limit=capacity))


def random_weights(
    config: ModelConfig, draft_vocab: int | None, dtype: jnp.dtype, key: Array, slots: bool = False
) -> Weights:
    """Random weights for a target, and for an EAGLE draft whose head keeps `draft_vocab` rows (None: no draft).

    slots: whether the draft has any for ids of the text, and so the whole head.
    """
    target_key, draft_key = jax.random.split(key)
    target = _random(target_key, model_shapes(config, dtype))
    if draft_vocab is None:
        return Weights(target, NO_WEIGHTS)
    params = _random(draft_key, EagleConfig.like(config).shapes(config, dtype))
    kept = np.arange(draft_vocab)
    whole = WholeHead.of(target.head, kept) if slots else None
    return Weights(target, EagleWeights(target.embedding, crop(target.head, kept), whole, params))


def _random(key: Array, shapes: Any) -> Any:
    """Arrays of these shapes: matrices of small random numbers, vectors (norms and biases) of ones."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    filled = [
        SPREAD * jax.random.normal(k, leaf.shape, leaf.dtype)
        if len(leaf.shape) == 2
        else jnp.ones(leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, filled)
