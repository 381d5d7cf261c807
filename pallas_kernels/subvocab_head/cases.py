"""The sub-vocabulary head at the sizes of published models: what tests lower, and what the bench times."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.dispatch import power_of_two
from pallas_kernels.models import SHAPES, Shape
from pallas_kernels.subvocab_head import Config, subvocab_top_k
from pallas_kernels.timing import Case

VOCABULARIES = (8192, 16384, 32768, 65536, None)  # None is the model's own
TOP_K = 10
BLOCKS_V = (64, 128)
WARPS_STAGES = ((4, 2), (4, 3), (8, 3))


def arguments(
    model: Shape, rows: int, vocabulary: int | None, dtype: DTypeLike
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of x and head, the head cropped to `vocabulary` ids (None: all)."""
    size = vocabulary or model.vocabulary
    return jax.ShapeDtypeStruct((rows, model.hidden), dtype), jax.ShapeDtypeStruct((size, model.hidden), dtype)


def sweep(hidden: int) -> tuple[Config, ...]:
    """Configs worth trying for features of `hidden` numbers, first the one that would suit."""
    suited = Config.suited_to(hidden)
    others = (
        dataclasses.replace(suited, block_v=block_v, num_warps=warps, num_stages=stages)
        for block_v, (warps, stages) in itertools.product(BLOCKS_V, WARPS_STAGES)
    )
    return tuple(dict.fromkeys((suited, *others)))


def timed(name: str, rows: int, vocabulary: int | None, dtype: DTypeLike, k: int = TOP_K) -> Case:
    """The best `k` of `vocabulary` ids for `rows` features, at the sizes of the model called `name`."""
    rng = np.random.default_rng(0)
    shapes = arguments(SHAPES[name], rows, vocabulary, dtype)
    x, head = (jnp.asarray(rng.standard_normal(s.shape, np.float32), dtype) for s in shapes)
    return Case(
        operation="subvocab_head",
        label=f"{name}, {rows} rows, V' = {head.shape[0]:,}, top {k}",
        dtype=head.dtype.name,
        shape={"rows": power_of_two(rows), "hidden": SHAPES[name].hidden, "vocabulary": head.shape[0]},
        bytes=head.nbytes,
        run=functools.partial(_scores, k=k),
        moving=x,
        still=(head,),
        configs=sweep(SHAPES[name].hidden),
        tolerance=5e-2 if head.dtype == jnp.bfloat16 else 1e-3,
    )


def _scores(x: Array, head: Array, k: int, **how: Any) -> Array:
    return subvocab_top_k(x, head, k, **how)[0]
