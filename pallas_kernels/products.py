"""Products that accumulate in float32, whatever the operands' dtype, on every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike

from pallas_kernels.batching import by_rows


def precision_of(x: Array) -> lax.Precision | None:
    """Float32 keeps all of its bits: by default a GPU would round its products to TF32, and near-ties would flip."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def einsum_f32(spec: str, a: Array, b: Array) -> Array:
    """`jnp.einsum` of two arrays with a float32 result.

    In bfloat16 this is what a CPU with matrix units (AMX) is fast at: asked for a bfloat16 result, XLA takes
    ten times as long there.
    """
    return jnp.einsum(spec, a, b, precision=precision_of(a), preferred_element_type=jnp.float32)


def turned(x: Array) -> Array:
    """x.T, on a CPU laid anew in order of its rows: the library that XLA's CPU backend calls takes nothing else.

    Measured for the sum over 2,048 rows of bfloat16 that makes a weight's gradient, 4,864 by 896, on two cores
    with AMX: 14 ms instead of 58.
    """
    return lax.platform_dependent(x, cpu=lambda x: with_layout_constraint(x.T, Layout((0, 1))), default=jnp.transpose)


def in_rows(x: Array) -> Array:
    """x [T, H]; in bfloat16 on a CPU laid out row by row, whatever made it.

    A product may leave its columns side by side (`_weight_on_the_left`). The sum of a row's squares would then be taken
    in another order, and a tree of many tokens round otherwise than one.
    """
    return by_rows(_in_rows, x, None) if x.dtype == jnp.bfloat16 else x


def _in_rows(x: Array, _: None) -> Array:
    def laid(x: Array) -> Array:
        return lax.optimization_barrier(with_layout_constraint(x, Layout((0, 1))))

    return lax.platform_dependent(x, cpu=laid, default=lambda x: x)


FEW_ROWS = 16  # up to so many rows a CPU multiplies sooner with the weight on the left


@jax.custom_vjp
def rows_f32(x: Array, weight: Array) -> Array:
    """x [T, in] times the rows of weight [out, in]: float32 [T, out]. Its gradients are products in x's dtype too."""
    return by_rows(_rows_f32, x, weight)


def _rows_f32(x: Array, weight: Array) -> Array:
    rows, narrow = x.shape[0], x.dtype == jnp.bfloat16
    if rows > FEW_ROWS or (rows == 1 and not narrow):
        return _plain(x, weight)
    cpu = _one_row if rows == 1 else _weight_on_the_left
    return lax.platform_dependent(x, weight, cpu=cpu, default=_plain)


def _plain(x: Array, weight: Array) -> Array:
    return einsum_f32("ti,oi->to", x, weight)


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return rows_f32(x, weight), (x, weight)


def _backward(kept: tuple[Array, Array], by_rows: Array) -> tuple[Array, Array]:
    """JAX's own gradient would widen x and the weight to the float32 of `by_rows`: a quarter of the speed with AMX."""
    x, weight = kept
    by_rows = by_rows.astype(x.dtype)
    by_x = einsum_f32("to,oi->ti", by_rows, weight.astype(x.dtype))
    by_weight = einsum_f32("ot,ti->oi", turned(by_rows), x)
    return by_x.astype(x.dtype), by_weight.astype(weight.dtype)


rows_f32.defvjp(_forward, _backward)


def _weight_on_the_left(x: Array, weight: Array) -> Array:
    """The same product for XLA's CPU backend: it packs what stands on the right, so that must be the small one.

    Measured for all layers of SmolLM2-135M on two cores, 4 rows and 8: in float32 26 and 29 ms instead of 32 and 33,
    in bfloat16 10 and 12 instead of 14. Without the barrier XLA folds the transpositions and swaps the operands back.
    The rows must lie in order: handed the columns of an earlier product, turned, XLA takes its library to be unfit for
    them, and widens the whole weight to float32.
    """
    x = with_layout_constraint(x, Layout((0, 1)))
    return lax.optimization_barrier(einsum_f32("oi,ti->ot", weight, x)).T


def _one_row(x: Array, weight: Array) -> Array:
    """One bfloat16 row as two: the product of a matrix and a vector takes XLA's CPU backend 14 times as long.

    A row's result does not depend on how many stand beside it, so one token and a tree of many give the same bits.
    """
    x = lax.optimization_barrier(x)  # or XLA computes each of the two anew, number by number
    return _weight_on_the_left(jnp.concatenate([x, x]), weight)[:1]


def take_rows(table: Array, ids: ArrayLike) -> Array:
    """table[ids]. A bfloat16 table gives its rows as bits: XLA's CPU backend would first widen the whole of it.

    The barrier ties the table to the ids, so that a loop cannot take out the reading of all its bits as a copy.
    """
    if table.dtype != jnp.bfloat16:
        return table[ids]
    table, ids = lax.optimization_barrier((table, ids))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(table, jnp.uint16)[ids], table.dtype)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [T, in] times the rows of weight [out, in], plus bias [out]: [T, out] in x's dtype."""
    if x.dtype == jnp.float32:
        y = rows_f32(x, weight)
    else:  # a GPU rounds a float32 sum as it stores it; XLA's CPU backend is slow at that
        y = lax.platform_dependent(x, weight, cpu=_through_float32, default=_in_its_own_dtype)
    return y if bias is None else y + bias


def _through_float32(x: Array, weight: Array) -> Array:
    return rows_f32(x, weight).astype(x.dtype)


def _in_its_own_dtype(x: Array, weight: Array) -> Array:
    return jnp.einsum("ti,oi->to", x, weight)


STEADY_SUM = 4096  # XLA's CPU backend sums fewer numbers than these with other instructions


def mean_square(x: Array) -> Array:
    """The mean of x² over the last axis of x [T, ..., H]: float32 [T, ..., 1].

    In bfloat16 one token rounds as a tree of many does: rows of zeros bring the sum to a size from which XLA's CPU
    backend uses one set of instructions.
    """
    x32 = x.astype(jnp.float32)
    square = x32 * x32
    if x.dtype == jnp.bfloat16:
        spare = max(0, -(-STEADY_SUM // x.shape[-1]) - x.shape[0])
        square = jnp.pad(square, ((0, spare), *[(0, 0)] * (x.ndim - 1)))
    return square.mean(-1, keepdims=True)[: x.shape[0]]


def rms_norm(x: Array, weight: Array, eps: float, offset: float = 0.0) -> Array:
    """Scale to unit mean square, in float32, and back to x's dtype before the learned weight.

    offset: is added to the weight (Gemma's 1 + w), and then all of it is done in float32.
    """
    normed = x.astype(jnp.float32) * lax.rsqrt(mean_square(x) + eps)
    if offset:
        return (normed * (weight.astype(jnp.float32) + offset)).astype(x.dtype)
    return normed.astype(x.dtype) * weight


def capped(scores: Array, cap: float) -> Array:
    """Scores that a soft cap (Gemma 2) keeps within -cap and cap; 0: as they are."""
    return scores if cap == 0 else cap * jnp.tanh(scores / cap)
