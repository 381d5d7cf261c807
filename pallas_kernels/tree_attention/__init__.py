"""Attention of a few tokens over a KV cache, where the newest rows form a tree.

What each query sees is a `Sees`: the committed rows, and of the rows that follow them its own ancestors. A chain of
ancestors gives ordinary causal attention, so prefill, one token and a tree are one operation.
"""

from __future__ import annotations

import functools

import jax
from jax import Array

from pallas_kernels.batching import from_pool
from pallas_kernels.bits import floats_of
from pallas_kernels.device import current
from pallas_kernels.dispatch import Implementation, choose, resolve
from pallas_kernels.tree_attention import mosaic_config, triton, xla
from pallas_kernels.tree_attention.triton import Config
from pallas_kernels.tree_attention.xla import BLOCK, How, seam
from pallas_kernels.visibility import Sees

__all__ = ["BLOCK", "Config", "How", "attention_rows", "seam", "tree_attention"]


def tree_attention(
    q: Array,
    keys: Array,
    values: Array,
    sees: Sees,
    *,
    slot: Array | None = None,
    implementation: Implementation = "auto",
    config: Config | mosaic_config.Config | None = None,
    how: How = How(),
) -> Array:
    """Softmax attention with float32 scores, scaled by 1/sqrt(head_dim).

    Args:
      q: [T, heads, head_dim], rotated.
      keys, values: [kv_heads, S, head_dim], or with a slot [slots, kv_heads, S, head_dim], the tree's own rows
        included; S a multiple of BLOCK. Floats, or the bits of bfloat16 as uint16.
      sees: which of the S rows each query attends to, at least one each.
      slot: int32, which part of a pool is this sequence's.
      implementation: see `dispatch`. config: the kernel's, instead of the one chosen for the shape. Its class says
        whether that is Triton's or Mosaic's; where Mosaic's cannot be had for these arrays, Triton's runs as it suits.
      how: what becomes of the scores, how they are rounded, and how many of the rows may be seen at all.

    Returns:
      [T, heads, head_dim] in q's dtype.
    """
    run = functools.partial(_of_each, implementation=implementation, config=config, how=how)
    if slot is None:
        return run(q[None], keys[None], values[None], sees.each(), None)[0]

    def each(pool: tuple[Array, Array], own: tuple[Array, Sees, Array]) -> Array:
        return run(own[0], *pool, *own[1:])

    return from_pool(each, (keys, values), (q, sees, slot))


def _of_each(
    q: Array,
    keys: Array,
    values: Array,
    sees: Sees,
    slot: Array | None,
    *,
    implementation: Implementation,
    config: Config | mosaic_config.Config | None,
    how: How,
) -> Array:
    """`tree_attention` of B sequences: q, sees and slot with an axis for them, keys and values with one for slots.

    No slot: B is 1, and so are the slots.
    """
    (batch, tokens, heads, head_dim), kv_heads = q.shape, keys.shape[1]
    folded = tokens * heads // kv_heads
    shape = {"rows": folded, "kv_heads": kv_heads, "head_dim": head_dim}
    wanted = mosaic_config.Config if implementation == "mosaic" else Config
    default = config or wanted.suited_to(folded, kv_heads * batch)
    implementation, chosen = choose(
        implementation,
        "tree_attention",
        keys.dtype,
        shape,
        default,
        unmeasured="pallas",
        kinds=(Config, mosaic_config.Config),
    )
    if implementation == "xla":
        if current().platform == "gpu":
            at = slice(None) if slot is None else slot
            straight = functools.partial(xla.straight, cap=how.cap)
            return jax.vmap(straight)(q, keys[at, :, : how.rows], values[at, :, : how.rows], sees)
        if slot is None:
            return xla.tree_attention(q[0], keys[0], values[0], sees.only(), how)[None]
        return xla.in_slots(q, keys, values, sees, slot, how)
    keys, values, interpret = floats_of(keys), floats_of(values), implementation == "interpret"
    if isinstance(chosen, mosaic_config.Config):
        # A text by itself; several in a pool are Triton's, and so is attention with a window or a cap.
        plain = slot is None and batch == 1 and sees.first is None and how.cap == 0
        if plain and mosaic_config.takes(q[0], keys[0], chosen, interpret):
            from pallas_kernels.tree_attention import mosaic  # which imports a compiler

            return mosaic.tree_attention(q[0], keys[0], values[0], sees.only(), chosen, interpret)[None]
        chosen = Config.suited_to(folded, kv_heads * batch)
    return triton.tree_attention(q, keys, values, sees, slot, chosen, how.cap, interpret)


def attention_rows(capacity: int, implementation: Implementation) -> tuple[int, ...]:
    """How many rows attention may be limited to, ascending, the capacity last; that alone where nothing is won by it.

    XLA's attention on a GPU reads every row that it is given, in straight-line code. The others stop at the last live
    row by themselves.
    """
    if current().platform != "gpu" or resolve(implementation) != "xla":
        return (capacity,)
    return (*(rows for rows in (512, 2048, 8192) if 2 * rows <= capacity), capacity)
