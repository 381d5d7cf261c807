"""Tree attention at the sizes of published models: what tests lower, and what the bench times."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.models import SHAPES, Shape
from pallas_kernels.timing import Case
from pallas_kernels.tree_attention import BLOCK, Config, mosaic_config, tree_attention
from pallas_kernels.visibility import Sees, causal

TOKENS = (1, 10, 60)  # one token, a level of EAGLE's tree, a whole tree
BLOCKS_K = (64, 128)
WARPS_STAGES = ((4, 2), (4, 3), (8, 3))
STAGES = (2, 3, 4)  # of the kernel in Mosaic GPU


def arguments(
    model: Shape, tokens: int, capacity: int, dtype: DTypeLike
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Sees]:
    """Shapes of q, keys, values and sees."""
    words = -(-tokens // 32)
    rows = jax.ShapeDtypeStruct((model.kv_heads, capacity, model.head_dim), dtype)
    sees = Sees(jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((tokens, words), jnp.int32))  # type: ignore[arg-type]
    return jax.ShapeDtypeStruct((tokens, model.heads, model.head_dim), dtype), rows, rows, sees


def sweep(rows: int, kv_heads: int) -> tuple[Config, ...]:
    """Configs worth trying for `rows` = T G rows a KV head, first the one that would suit."""
    suited = Config.suited_to(rows, kv_heads)
    splits = sorted({max(1, suited.splits // 2), suited.splits})
    others = (
        dataclasses.replace(suited, block_k=block_k, splits=split, num_warps=warps, num_stages=stages)
        for block_k, split, (warps, stages) in itertools.product(BLOCKS_K, splits, WARPS_STAGES)
    )
    return tuple(dict.fromkeys((suited, *others)))


def mosaic_sweep(q: jax.Array, keys: jax.Array) -> tuple[mosaic_config.Config, ...]:
    """Configs of the kernel in Mosaic GPU worth trying, first the one that would suit; none where it cannot be had."""
    kv_heads = keys.shape[0]
    suited = mosaic_config.Config.suited_to(q.shape[0] * q.shape[1] // kv_heads, kv_heads)
    splits = sorted({max(1, suited.splits // 2), suited.splits})
    others = (
        dataclasses.replace(suited, block_k=block_k, splits=split, stages=stages)
        for block_k, split, stages in itertools.product(BLOCKS_K, splits, STAGES)
    )
    return tuple(c for c in dict.fromkeys((suited, *others)) if mosaic_config.takes(q, keys, c, interpret=False))


def timed(name: str, tokens: int, context: int, dtype: DTypeLike) -> Case:
    """A chain of `tokens` over a cache of `context` live rows, at the sizes of the model called `name`."""
    model, capacity = SHAPES[name], -(-(context + tokens) // (4 * BLOCK)) * 4 * BLOCK
    rng = np.random.default_rng(0)
    shapes = arguments(model, tokens, capacity, dtype)[:3]
    q, keys, values = (jnp.asarray(rng.standard_normal(s.shape, np.float32), dtype) for s in shapes)
    rows = tokens * model.heads // model.kv_heads
    return Case(
        operation="tree_attention",
        label=f"{name}, {tokens} tokens, context {context}",
        dtype=keys.dtype.name,
        shape={"rows": rows, "kv_heads": model.kv_heads, "head_dim": model.head_dim},
        bytes=2 * (context + tokens) * model.kv_heads * model.head_dim * keys.dtype.itemsize,
        run=tree_attention,
        moving=q,
        still=(keys, values, Sees(jnp.int32(context), causal(tokens))),
        configs=(*sweep(rows, model.kv_heads), *mosaic_sweep(q, keys)),
        tolerance=2e-2 if keys.dtype == jnp.bfloat16 else 1e-5,
    )
