"""The sub-vocabulary head in XLA: all logits in memory, then their top-k and log-sum-exp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import largest
from pallas_kernels.products import rows_f32
from pallas_kernels.subvocab_head.heads import Extra, Head, joined_ids


def subvocab_top_k(x: Array, head: Head, k: int, extra: Extra | None) -> tuple[Array, Array]:
    """`pallas_kernels.subvocab_head.subvocab_top_k`; arguments and result as there."""
    weight, scale, ids = head.weight, head.scale, head.ids
    logits = rows_f32(x, weight) if scale is None else rows_f32(x, weight.astype(x.dtype)) * scale
    if extra is not None:
        more = jnp.where(extra.ids < 0, -jnp.inf, rows_f32(x, extra.weight.astype(x.dtype)))
        logits, ids = jnp.concatenate([logits, more], axis=-1), joined_ids(head, extra)
    best, index = largest.top_k(logits, k)
    log_total = lax.platform_dependent(logits, best, cpu=lambda logits, _: logsumexp(logits), default=_above_the_best)
    return best - log_total, index if ids is None else ids[index]


def logsumexp(logits: Array) -> Array:
    """Over each row of logits [M, V']: [M, 1]."""
    return jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _above_the_best(logits: Array, best: Array) -> Array:
    """The same, where the best logits are known: no pass over all of them finds the largest.

    Not for a CPU: there XLA would sort all logits, once the best of a top-k are read on their own.
    """
    peak = best[:, :1]
    return peak + jnp.log(jnp.exp(logits - peak).sum(-1, keepdims=True))
