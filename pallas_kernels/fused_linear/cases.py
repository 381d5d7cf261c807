"""The products of a layer at the sizes of published models: what tests lower, and what the bench times."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.dispatch import power_of_two
from pallas_kernels.fused_linear import Config, Gate, Norm, fused_linear
from pallas_kernels.models import SHAPES
from pallas_kernels.timing import Case

Product = Literal["qkv", "output", "gate and up", "down"]
PRODUCTS: tuple[Product, ...] = get_args(Product)
ROWS = (1, 10, 60)  # one token, a level of EAGLE's tree, a whole tree
BLOCKS_O = (16, 32, 64)
WARPS_STAGES = ((4, 3), (4, 5), (8, 4))


def arguments(name: str, rows: int, product: Product, dtype: DTypeLike) -> tuple[Any, Any, dict[str, Any]]:
    """Shapes of x and of the weight, and of what stands around the product in a layer: arguments of `fused_linear`."""
    model = SHAPES[name]
    heads = model.heads * model.head_dim
    inputs, outputs = {
        "qkv": (model.hidden, heads + 2 * model.kv_heads * model.head_dim),
        "output": (heads, model.hidden),
        "gate and up": (model.hidden, 2 * model.intermediate),
        "down": (model.intermediate, model.hidden),
    }[product]
    shape = jax.ShapeDtypeStruct
    around: dict[str, Any] = {}
    if product in ("qkv", "gate and up"):
        around["norm"] = Norm(shape((inputs,), dtype), 1e-5)  # type: ignore[arg-type]
    else:
        around["residual"] = shape((rows, outputs), dtype)
    return shape((rows, inputs), dtype), shape((outputs, inputs), dtype), around


def sweep(outputs: int, inputs: int) -> tuple[Config, ...]:
    """Configs worth trying, first the one that would suit."""
    suited = Config.suited_to(outputs, inputs)
    others = (
        dataclasses.replace(suited, block_o=block, num_warps=warps, num_stages=stages)
        for block, (warps, stages) in itertools.product(BLOCKS_O, WARPS_STAGES)
    )
    return tuple(dict.fromkeys((suited, *others)))


def timed(name: str, rows: int, product: Product, dtype: DTypeLike) -> Case:
    """One product of a layer, with what stands around it."""
    rng = np.random.default_rng(0)
    x, weight, around = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) / np.sqrt(s.shape[-1]), dtype),
        arguments(name, rows, product, dtype),
    )
    gate: Gate | None = "silu" if product == "gate and up" else None
    halves = 1 if gate is None else 2
    outputs = weight.shape[0] // halves

    def run(x: Array, weight: Array, around: dict[str, Any], **how: Any) -> Array:
        return fused_linear(x, weight, gate=gate, **around, **how)

    return Case(
        operation="fused_linear",
        label=f"{name}, {product} of {rows} rows",
        dtype=weight.dtype.name,
        shape={"rows": power_of_two(rows), "inputs": x.shape[1], "outputs": outputs, "halves": halves},
        bytes=weight.nbytes,
        run=run,
        moving=x,
        still=(weight, around),
        configs=sweep(outputs, x.shape[1]),
        tolerance=2e-2 if weight.dtype == jnp.bfloat16 else 1e-4,
    )
