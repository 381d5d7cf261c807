"""The shapes of weights, as `ShapeDtypeStruct`s: what conversion must fill and loading expects."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from frspec_jax.config import ModelConfig
from frspec_jax.layers import LayerParams
from frspec_jax.llama import LlamaParams


def struct(dtype: Any, *shape: int) -> Any:
    """One array's shape and dtype; typed as whatever field it stands for."""
    return jax.ShapeDtypeStruct(shape, dtype)


def layer_shapes(
    config: ModelConfig, dtype: Any, *, attention_norm: bool = True, inputs: int | None = None
) -> LayerParams:
    """The weights of one decoder layer.

    Args:
      attention_norm: whether the layer norms its input itself.
      inputs: what Q, K and V read (default: H).
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return LayerParams(
        attention_norm=struct(dtype, hidden) if attention_norm else None,
        qkv=struct(dtype, qkv, inputs or hidden),
        qkv_bias=struct(dtype, qkv) if config.attention_bias else None,
        output=struct(dtype, hidden, config.num_heads * config.head_dim),
        output_bias=struct(dtype, hidden) if config.output_bias else None,
        mlp_norm=struct(dtype, hidden),
        gate_up=struct(dtype, 2 * inner, hidden),
        gate_up_bias=struct(dtype, 2 * inner) if config.mlp_bias else None,
        down=struct(dtype, hidden, inner),
        down_bias=struct(dtype, hidden) if config.mlp_bias else None,
        query_norm=struct(dtype, config.head_dim) if config.head_norms else None,
        key_norm=struct(dtype, config.head_dim) if config.head_norms else None,
        attention_out_norm=struct(dtype, hidden) if config.norms == "around" else None,
        mlp_out_norm=struct(dtype, hidden) if config.norms == "around" else None,
    )


def model_shapes(config: ModelConfig, dtype: Any = np.float32) -> LlamaParams:
    """The weights of a target."""
    table = struct(dtype, config.vocab_size, config.hidden_size)
    return LlamaParams(
        embedding=table,
        layers=tuple(layer_shapes(config, dtype) for _ in range(config.num_layers)),
        final_norm=struct(dtype, config.hidden_size),
        lm_head=None if config.tied_head else table,
    )
