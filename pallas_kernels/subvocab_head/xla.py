"""The sub-vocabulary head in XLA: all logits in memory, then their top-k and log-sum-exp."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.products import rows_f32


def subvocab_top_k(x: Array, head: Array, k: int, scale: Array | None, ids: Array | None) -> tuple[Array, Array]:
    """`pallas_kernels.subvocab_head.subvocab_top_k`; arguments and result as there."""
    logits = rows_f32(x, head) if scale is None else rows_f32(x, head.astype(x.dtype)) * scale
    best, index = lax.top_k(logits, k)
    peak = best[:, :1]  # known already: no pass over the logits goes into it
    log_total = peak + jnp.log(jnp.exp(logits - peak).sum(-1, keepdims=True))
    return best - log_total, index if ids is None else ids[index]
