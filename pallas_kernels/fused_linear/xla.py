"""The product with its surroundings in XLA: each an operation of its own."""

from __future__ import annotations

from typing import Literal

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
    offset: float = struct.field(pytree_node=False, default=0.0)  # added to the weight (Gemma's 1 + w)

    def __call__(self, x: Array) -> Array:
        """x [..., H] normed, in its dtype."""
        return rms_norm(x, self.weight, self.eps, self.offset)


Gate = Literal["silu", "gelu"]  # gelu: approximated by tanh, as Gemma has it


def gated(gate_up: Array, by: Gate = "silu") -> Array:
    """silu(gate) * up of [T, 2 F], in float32, where a CPU is quicker at exponentials: [T, F] in its dtype."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    activated = jax.nn.silu(gate) if by == "silu" else jax.nn.gelu(gate, approximate=True)
    return (activated * up).astype(gate_up.dtype)


def fused_linear(
    x: Array, weight: Array, bias: Array | None, norm: Norm | None, gate: Gate | None, residual: Array | None
) -> Array:
    """`pallas_kernels.fused_linear.fused_linear`; arguments and result as there."""
    y = linear(x if norm is None else norm(x), weight, bias)
    y = y if gate is None else gated(y, gate)
    return y if residual is None else residual + y
