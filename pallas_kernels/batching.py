"""What an operation does under `jax.vmap`, where that is not what JAX would make of it.

A batch of sequences is the round of one under `vmap`. JAX's own rule would give each sequence its own product with a
weight that all share, and would turn a cache of which each sequence owns a part into as many caches. The two rules here
say what is meant: rows of all sequences go through a product together; and what lives in a pool stays one pool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

Rows = TypeVar("Rows")
Out = TypeVar("Out")
Pool = TypeVar("Pool")
Own = TypeVar("Own")


def _each_own(size: int, batched: Any, values: Any) -> Any:
    """The same values with a leading axis [size, ...] each; those that all sequences share are repeated."""
    return jax.tree.map(lambda b, x: x if b else jnp.broadcast_to(x, (size, *jnp.shape(x))), batched, values)


def _whether(tree: Any, batched: bool) -> Any:
    return jax.tree.map(lambda _: batched, tree)


def by_rows(f: Callable[[Rows, Any], Out], rows: Rows, shared: Any) -> Out:
    """`f(rows, shared)`; under vmap, one call with the rows of all sequences.

    Args:
      f: from arrays [T, ...] to arrays [T, ...], row by row. rows: a pytree of such arrays. shared: a pytree of arrays
        that every sequence reads alike, such as a weight.
    """

    @custom_vmap
    def run(rows: Rows, shared: Any) -> Out:
        return f(rows, shared)

    @run.def_vmap
    def of_all(size: int, batched: Any, rows: Rows, shared: Any) -> tuple[Out, Any]:
        if any(jax.tree.leaves(batched[1])):  # then there is nothing to share
            axes = jax.tree.map(lambda b: 0 if b else None, batched)
            out = jax.vmap(f, in_axes=tuple(axes))(rows, shared)
        else:
            every = _each_own(size, batched[0], rows)
            flat = jax.tree.map(lambda x: x.reshape(size * x.shape[1], *x.shape[2:]), every)
            out = run(flat, shared)
            out = jax.tree.map(lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:]), out)
        return out, _whether(out, True)

    return run(rows, shared)


def in_pool(
    each: Callable[[Pool, Own, Any], tuple[Out, Pool]], pool: Pool, own: Own, shared: Any = None
) -> tuple[Out, Pool]:
    """What a sequence does to its part of a pool, and what it gives beside it; under vmap the pool stays one.

    Args:
      each: from the pool and the arguments of B sequences to what each gives, and the pool: every array but the pool's
        is [B, ...].
      pool: arrays that hold the parts of all sequences. own: arguments of this one, which say what its part is.
      shared: a pytree of arrays that every sequence reads alike, such as a weight. (What `each` would take from around
        it instead, JAX could not trace within a loop.)
    """

    @custom_vmap
    def run(pool: Pool, own: Own, shared: Any) -> tuple[Out, Pool]:
        out, pool = each(pool, jax.tree.map(lambda x: x[None], own), shared)
        return jax.tree.map(lambda x: x[0], out), pool

    @run.def_vmap
    def of_all(size: int, batched: Any, pool: Pool, own: Own, shared: Any) -> tuple[tuple[Out, Pool], Any]:
        if any(jax.tree.leaves((batched[0], batched[2]))):
            raise ValueError("a pool is shared by the sequences of a batch, and may not have an axis for them")
        out, pool = each(pool, _each_own(size, batched[1], own), shared)
        return (out, pool), (_whether(out, True), _whether(pool, False))

    return run(pool, own, shared)


def from_pool(each: Callable[[Pool, Own], Out], pool: Pool, own: Own) -> Out:
    """The same for what only reads."""

    @custom_vmap
    def run(pool: Pool, own: Own) -> Out:
        return jax.tree.map(lambda x: x[0], each(pool, jax.tree.map(lambda x: x[None], own)))

    @run.def_vmap
    def of_all(size: int, batched: Any, pool: Pool, own: Own) -> tuple[Out, Any]:
        if any(jax.tree.leaves(batched[0])):
            raise ValueError("a pool is shared by the sequences of a batch, and may not have an axis for them")
        out = each(pool, _each_own(size, batched[1], own))
        return out, _whether(out, True)

    return run(pool, own)
