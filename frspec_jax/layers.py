"""The parts of a decoder layer, shared by the target and the EAGLE draft."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from jax.typing import ArrayLike

from frspec_jax import kv_cache
from frspec_jax.config import USUAL_LAYER, LayerKind, ModelConfig, RopeScaling
from frspec_jax.kv_cache import LayerKV
from frspec_jax.placement import Placement
from pallas_kernels.dispatch import AUTO, Kernels
from pallas_kernels.fused_linear import Norm, fused_linear, gated
from pallas_kernels.products import in_rows, linear, take_rows
from pallas_kernels.rotary_append import HeadNorms, Rotation, rotate
from pallas_kernels.tree_attention import How, tree_attention


@struct.dataclass
class LayerParams:
    """One decoder layer. Weights lie [out, in]; Q, K and V, and gate and up, are one product each.

    [out, in] is the layout of the published checkpoints, and on a CPU a product of a few rows with it
    takes 0.8 of the time of [in, out]: XLA has to repack the weight, and packs this one in order.
    """

    attention_norm: Array | None  # [H]; None in an EAGLE draft, whose layer has no input norm
    qkv: Array  # [(heads + 2 kv_heads) head_dim, H]
    qkv_bias: Array | None  # [(heads + 2 kv_heads) head_dim]
    output: Array  # [H, heads head_dim]
    output_bias: Array | None  # [H]
    mlp_norm: Array  # [H]
    gate_up: Array  # [2 F, H]
    gate_up_bias: Array | None  # [2 F]
    down: Array  # [H, F]
    down_bias: Array | None  # [H]
    # Of families that have them.
    query_norm: Array | None = None  # [head_dim]
    key_norm: Array | None = None  # [head_dim]
    attention_out_norm: Array | None = None  # [H], of what attention adds
    mlp_out_norm: Array | None = None  # [H], of what the MLP adds


def embedded(table: Array, tokens: ArrayLike, config: ModelConfig) -> Array:
    """What the first layer reads of tokens [T]: their rows [T, H] of the embedding [V, H], scaled by some families."""
    rows = take_rows(table, tokens)
    return rows if config.embedding_scale == 1 else rows * jnp.asarray(config.embedding_scale, rows.dtype)


def rope_frequencies(config: ModelConfig, kind: LayerKind = USUAL_LAYER) -> np.ndarray:
    """Angle a position, in radians, of each of the head_dim / 2 rotated pairs: float32 [head_dim / 2]."""
    dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    if kind.rotary == "none":
        return np.zeros(dim // 2, np.float32)
    if kind.rotary == "local":
        theta, scaling = config.local_rope_theta, RopeScaling()
    base = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    if scaling.kind == "linear":
        base = base / scaling.factor
    elif scaling.kind == "factors":
        base = base / np.array(scaling.factors, np.float32)
    elif scaling.kind == "llama3":
        wavelength = 2 * math.pi / base
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        blend = (scaling.original_context / wavelength - low) / (high - low)  # 0: slow, divided; 1: fast, kept
        blend = np.clip(blend, 0.0, 1.0)
        base = (1 - blend) * base / scaling.factor + blend * base
    elif scaling.kind == "yarn":

        def pair_that_rotates(times: float) -> float:
            return dim * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

        first, last = pair_that_rotates(scaling.beta_fast), pair_that_rotates(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        ramp = (np.arange(dim // 2, dtype=np.float32) - first) / max(last - first, 0.001)
        slow = np.clip(ramp, 0.0, 1.0)
        base = slow * base / scaling.factor + (1 - slow) * base
    return base.astype(np.float32)


def rotation(config: ModelConfig, positions: Array, kind: LayerKind = USUAL_LAYER) -> Rotation:
    """How layers of a kind rotate tokens at `positions` [T] int32.

    It is computed where it is used, so no table limits the context.

    The barrier keeps XLA from working out the angles again within each layer's fusion, once for every
    head: on a CPU that was a tenth of a pass over eight tokens.
    """
    angle = positions[:, None, None].astype(jnp.float32) * rope_frequencies(config, kind)
    scale = config.rope_scaling.attention_factor if kind.rotary == "global" else 1.0
    return Rotation(
        lax.optimization_barrier(jnp.concatenate([jnp.cos(angle) * scale, jnp.sin(angle) * scale], axis=-1))
    )


@struct.dataclass
class Pass:
    """What the layers of one kind share in one pass over T tokens."""

    config: ModelConfig = struct.field(pytree_node=False)
    kernels: Kernels = struct.field(pytree_node=False)  # which implementations run
    where: Placement  # the tokens stand
    by: Rotation  # their keys and queries are rotated

    @classmethod
    def of(cls, config: ModelConfig, where: Placement, kernels: Kernels = AUTO, kind: LayerKind = USUAL_LAYER) -> Pass:
        return cls(config, kernels, where.within(kind.window), rotation(config, where.positions, kind))

    def norm(self, weight: Array) -> Norm:
        """The model's kind of norm, with this weight."""
        return Norm(weight, self.config.rms_norm_eps, self.config.norm_offset)


def project_qkv(layer: LayerParams, config: ModelConfig, x: Array, by: Rotation) -> tuple[Array, Array, Array]:
    """Rotated queries [T, heads, head_dim], rotated keys and plain values [T, kv_heads, head_dim]."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    qkv = linear(x, layer.qkv, layer.qkv_bias).reshape(x.shape[0], heads + 2 * kv_heads, config.head_dim)
    rotated = rotate(qkv[:, : heads + kv_heads], by)
    return rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :]


def head_norms(layer: LayerParams, config: ModelConfig) -> HeadNorms | None:
    """What a layer's queries and keys go through before they are rotated; None: nothing."""
    if layer.query_norm is None or layer.key_norm is None:
        return None
    return HeadNorms(layer.query_norm, layer.key_norm, config.rms_norm_eps, config.norm_offset)


def gated_mlp(layer: LayerParams, x: Array) -> Array:
    """down(silu(gate(x)) * up(x)), as training runs it."""
    return linear(gated(linear(x, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)


def decoder_layer(
    layer: LayerParams, x: Array, here: Pass, cache: LayerKV, *, attend_from: Array | None = None
) -> tuple[Array, LayerKV]:
    """One decoder layer over T tokens, whose keys and values are put into the cache first.

    Args:
      x: [T, H] residual stream. here: where the tokens stand, and what the layers of its kind share.
      attend_from: what Q, K and V read; None: x, through the layer's own norm if it has one.
    """
    config, kernels = here.config, here.kernels
    product = functools.partial(fused_linear, implementation=kernels.product)

    def added(y: Array, weight: Array, bias: Array | None, x: Array, out_norm: Array | None) -> Array:
        """x, and the product of y beside it, which goes through a norm first where the family has one there."""
        if out_norm is None and kernels.axis is None:
            return product(y, weight, bias, residual=x)
        if kernels.axis is None:
            y = product(y, weight, bias)
        else:
            y = lax.psum(product(y, weight), kernels.axis)
            y = y if bias is None else y + bias
        return x + (y if out_norm is None else here.norm(out_norm)(in_rows(y)))

    with jax.named_scope("attention"):
        norm = None
        if attend_from is None:
            attend_from = x
            norm = None if layer.attention_norm is None else here.norm(layer.attention_norm)
        qkv = product(attend_from, layer.qkv, layer.qkv_bias, norm=norm)
        q, cache = kv_cache.rotary_append(cache, qkv, here.by, here.where, head_norms(layer, config), kernels.attention)
        if config.query_scale:
            q = q * jnp.asarray(config.query_scale * math.sqrt(config.head_dim), q.dtype)
        mixed = tree_attention(
            q,
            cache.keys,
            cache.values,
            here.where.sees,
            slot=cache.slot,
            implementation=kernels.attention,
            how=How(config.attention_cap, kernels.steady, kernels.rows),
        )
        x = added(mixed.reshape(x.shape[0], -1), layer.output, layer.output_bias, x, layer.attention_out_norm)
    with jax.named_scope("mlp"):
        norm = here.norm(layer.mlp_norm)
        inner = product(x, layer.gate_up, layer.gate_up_bias, norm=norm, gate=config.activation)
        return added(inner, layer.down, layer.down_bias, x, layer.mlp_out_norm), cache
