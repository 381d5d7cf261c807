"""The bookkeeping of a growing draft tree: of K beams with K children each, the K best children are the next beams."""

from __future__ import annotations

from jax import Array

from pallas_kernels.best_children import triton, xla
from pallas_kernels.best_children.xla import Children
from pallas_kernels.dispatch import Implementation, resolve

__all__ = ["Children", "best_children"]


def best_children(
    beams: Array, scores: Array, tokens: Array, sees: Array, own: Array, *, implementation: Implementation = "auto"
) -> Children:
    """Choose the next beams. Of equal children the earlier is better.

    Args:
      beams: [K] float32, the beams' own scores. scores: [K, K] float32, what each child adds to its beam's.
      tokens: [K, K] int32, the children's.
      sees: [K, W] int32 bit words, the rows that each beam sees. own: [K, W], the next beams' own rows.
      implementation: see `dispatch`.
    """
    implementation = resolve(implementation)
    if implementation == "xla":
        return xla.best_children(beams, scores, tokens, sees, own)
    return triton.best_children(beams, scores, tokens, sees, own, interpret=implementation == "interpret")
