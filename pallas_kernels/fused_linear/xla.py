"""The product with its surroundings in XLA: each an operation of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from pallas_kernels.products import linear, rms_norm


@struct.dataclass
class Norm:
    """A root-mean-square norm."""

    weight: Array  # [H]
    eps: float = struct.field(pytree_node=False)


def gate(gate_up: Array) -> Array:
    """silu(gate) * up of [T, 2 F], in float32, where a CPU is quicker at exponentials: [T, F] in its dtype."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def fused_linear(
    x: Array, weight: Array, bias: Array | None, norm: Norm | None, gated: bool, residual: Array | None
) -> Array:
    """`pallas_kernels.fused_linear.fused_linear`; arguments and result as there."""
    y = linear(x if norm is None else rms_norm(x, norm.weight, norm.eps), weight, bias)
    y = gate(y) if gated else y
    return y if residual is None else residual + y
