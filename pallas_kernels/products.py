"""Products that accumulate in float32, whatever the operands' dtype, on every backend."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax


def precision_of(x: Array) -> lax.Precision | None:
    """Float32 keeps all of its bits: by default a GPU would round its products to TF32, and near-ties would flip."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def einsum_f32(spec: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays with a float32 result.

    A GPU multiplies bfloat16 as it is; XLA's CPU backend has no batched product of that kind, so there
    the operands are widened first.
    """
    if a.dtype == b.dtype == jnp.float32:
        return jnp.einsum(spec, a, b, precision=precision_of(a))

    def widened(a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32))

    def mixed(a: Array, b: Array) -> Array:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    return lax.platform_dependent(a, b, cpu=widened, default=mixed)
