"""The draft's LM head over a sub-vocabulary: log-probabilities and indices of its k best tokens."""

from __future__ import annotations

import jax
from jax import Array, lax

from pallas_kernels.products import einsum_f32


def subvocab_top_k(x: Array, head: Array, k: int) -> tuple[Array, Array]:
    """The k most probable rows of the head under the softmax over all of its rows.

    Args:
      x: [M, H] predicted features. head: [V', H]. k: at most V'.

    Returns:
      Log-probabilities [M, k], float32, descending, and row indices [M, k], int32; of equal
      logits the lower index comes first.
    """
    logits = einsum_f32("mh,vh->mv", x, head)
    best, index = lax.top_k(logits, k)
    return best - jax.nn.logsumexp(logits, axis=-1, keepdims=True), index
