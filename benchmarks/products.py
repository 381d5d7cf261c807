"""What a pass over 1, 2, ... rows costs a device: all matrices of a model's layers, in float32 and in bfloat16.

    python benchmarks/products.py [--shapes smollm2-135m]

Random weights, each product waiting for the one before; no attention, no norms, no LM head.
The table in docs/kernels.md comes from here.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console
from rich.table import Table

from frspec_jax.errors import reported
from frspec_jax.presets import SHAPES, model_config
from frspec_jax.shapes import model_shapes
from pallas_kernels import timing
from pallas_kernels.products import rows_f32

ROWS = (1, 2, 4, 8, 16, 32, 60)


def milliseconds(name: str, dtype: str) -> dict[int, float]:
    """The median time of a pass, by its rows."""
    shapes = [s.shape for s in jax.tree.leaves(model_shapes(model_config(name)).layers) if len(s.shape) == 2]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    weights = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]

    def step(weights: list[Array], inputs: dict[int, Array]) -> dict[int, Array]:
        last = jnp.zeros(())
        for weight in weights:
            width = weight.shape[1]
            last = rows_f32(timing.nudged(inputs[width], last), weight)
            inputs = inputs | {width: timing.nudged(inputs[width], last[:, :1])}
        return inputs

    found = {}
    for rows in ROWS:
        inputs = {shape[1]: jnp.ones((rows, shape[1]), dtype) for shape in shapes}
        found[rows] = round(timing.looped(step, weights, inputs, 5, repeats=9) / 1e3, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="smollm2-135m", metavar="MODEL", help=", ".join(SHAPES))
    args = parser.parse_args()
    figures = {dtype: milliseconds(args.shapes, dtype) for dtype in ("float32", "bfloat16")}
    table = Table("rows", *map(str, ROWS), title=f"{args.shapes}: ms for all matrices of its layers")
    for dtype, times in figures.items():
        table.add_row(dtype, *(f"{times[rows]:.1f}" for rows in ROWS))
    Console().print(table)


if __name__ == "__main__":
    with reported():
        main()
