"""What stands between the product for Q, K and V and attention: rotate queries and keys, write keys and values.

The caches are updated in place: to XLA they are arguments that a launch may overwrite.
"""

from __future__ import annotations

from jax import Array

from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.rotary_append import triton, xla
from pallas_kernels.rotary_append.xla import Rotation, rotate, written

__all__ = ["Rotation", "rotary_append", "rotate", "written"]


def rotary_append(
    qkv: Array,
    by: Rotation,
    keys: Array,
    values: Array,
    start: Array,
    *,
    skip: int = 0,
    implementation: Implementation = "auto",
) -> tuple[Array, Array, Array]:
    """Rotated queries, and a layer's cache with the keys and values of T tokens in its rows from `start + skip` on.

    Args:
      qkv: [T, (heads + 2 kv_heads) head_dim], the three side by side.
      by: how each token's queries and keys are rotated.
      keys, values: [kv_heads, S, head_dim]. Floats, or the bits of bfloat16 as uint16.
      start: int32. skip: known beforehand. The caller sees to it that the rows fit: XLA would otherwise shift the
        window back and overwrite rows before it.
      implementation: see `dispatch`.

    Returns:
      Queries [T, heads, head_dim], keys, values.
    """
    implementation = resolve(implementation)
    if implementation == "xla":
        return xla.rotary_append(qkv, by, keys, values, start + skip)
    return triton.rotary_append(qkv, by, keys, values, start, skip, interpret=implementation == "interpret")
