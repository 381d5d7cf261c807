"""Commit an accepted path: its rows move together in the caches of every layer."""

from __future__ import annotations

from typing import TypeVar

import jax
from jax import Array

from pallas_kernels.compaction import triton, xla
from pallas_kernels.dispatch import Implementation, resolve

__all__ = ["compact"]

Caches = TypeVar("Caches")


def compact(caches: Caches, start: Array, path: Array, *, implementation: Implementation = "auto") -> Caches:
    """Move tree rows `start + path[k]` to `start + k`.

    Args:
      caches: a pytree of arrays [kv_heads, S, head_dim], of one shape.
      start: int32, the root's row. path: [D+1] int32, node indices in the order of depth; path[0] is the root, which
        is in place already. They ascend as far as the path goes; past its end they may be anything, and so may be the
        rows that they fill.
      implementation: see `dispatch`.
    """
    if path.shape[0] == 1:
        return caches
    implementation = resolve(implementation)
    with jax.named_scope("compact"):
        arrays, tree = jax.tree.flatten(caches)
        if implementation == "xla":
            moved = [xla.moved(rows, start, path) for rows in arrays]
        else:
            moved = triton.moved(arrays, start, path, interpret=implementation == "interpret")
        return jax.tree.unflatten(tree, moved)
