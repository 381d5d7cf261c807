"""The next beams as one Pallas kernel for CUDA (Triton), of one program and one warp: there are a hundred children."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.best_children.xla import Children
from pallas_kernels.dispatch import divided, power_of_two


@functools.partial(jax.jit, static_argnames=("interpret",))  # equal layers are lowered once
def best_children(beams: Array, scores: Array, tokens: Array, sees: Array, own: Array, *, interpret: bool) -> Children:
    """`pallas_kernels.best_children.best_children`, by the kernel; arguments and result as there."""
    k, words = sees.shape
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return Children(
        *pl.pallas_call(
            _kernel,
            in_specs=[whole] * 5,
            out_specs=[whole] * 5,
            out_shape=[
                jax.ShapeDtypeStruct((k,), jnp.int32),
                jax.ShapeDtypeStruct((k,), jnp.int32),
                jax.ShapeDtypeStruct((k,), jnp.float32),
                jax.ShapeDtypeStruct((k, words), jnp.int32),
                jax.ShapeDtypeStruct((k * k,), jnp.float32),
            ],
            compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
            interpret=interpret,
            name="best_children",
        )(beams, scores, tokens, sees, own)
    )


def _kernel(*refs: Any) -> None:
    """Refs: the arguments of `best_children`, and the fields of `Children`."""
    beams_ref, scores_ref, tokens_ref, sees_ref, own_ref, number_ref, chosen_ref, best_ref, seen_ref, every_ref = refs
    k, words = sees_ref.shape
    child = lax.iota(jnp.int32, power_of_two(k * k))
    real = child < k * k
    beam, which = divided(child, k)
    beam = jnp.minimum(beam, k - 1)
    every = plt.load(beams_ref.at[beam], mask=real, other=-jnp.inf)
    every += plt.load(scores_ref.at[beam, which], mask=real, other=-jnp.inf)
    plt.store(every_ref.at[child], every, mask=real)
    slot = lax.iota(jnp.int32, power_of_two(k))
    number, best = jnp.zeros_like(slot), jnp.zeros(slot.shape, jnp.float32)
    left = real  # a child may score -inf, and is taken all the same: once
    for place in range(k):
        value = jnp.where(left, every, -jnp.inf).max(0)
        at = jnp.where(left & (every == value), child, k * k - 1).min(0)
        number = jnp.where(slot == place, at, number)
        best = jnp.where(slot == place, value, best)
        left = left & (child != at)
    mine, (parent, which) = slot < k, divided(number, k)
    plt.store(number_ref.at[slot], number, mask=mine)
    plt.store(best_ref.at[slot], best, mask=mine)
    plt.store(chosen_ref.at[slot], plt.load(tokens_ref.at[parent, which], mask=mine, other=0), mask=mine)
    for word in range(words):
        column = jnp.full_like(slot, word)
        row = plt.load(sees_ref.at[parent, column], mask=mine, other=0)
        row = row | plt.load(own_ref.at[slot, column], mask=mine, other=0)
        plt.store(seen_ref.at[slot, column], row, mask=mine)
