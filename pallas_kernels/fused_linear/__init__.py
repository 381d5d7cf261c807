"""A product with a weight, and what stands right before and right after it: a norm, a gate, a residual.

For a few rows the weight is nearly all that is read, and what counts is how few launches it takes.
"""

from __future__ import annotations

from typing import Any

from jax import Array

from pallas_kernels.batching import by_rows
from pallas_kernels.dispatch import Implementation, choose, power_of_two
from pallas_kernels.fused_linear import triton, xla
from pallas_kernels.fused_linear.triton import MOST_ROWS, Config
from pallas_kernels.fused_linear.xla import Gate, Norm, gated

__all__ = ["Config", "Gate", "Norm", "fused_linear", "gated"]


def fused_linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    norm: Norm | None = None,
    gate: Gate | None = None,
    residual: Array | None = None,
    implementation: Implementation = "auto",
    config: Config | None = None,
) -> Array:
    """`norm(x)` times the rows of `weight`, plus bias; then gate(first half) * second half, if any; plus residual.

    Args:
      x: [T, in]. weight: [out, in], or [2 out, in] with the gate's rows first if there is one. bias: of as many.
      gate: the activation of a gated product. norm: what x goes through first; None: nothing.
      residual: [T, out], added at the end.
      implementation: see `dispatch`; more than `MOST_ROWS` rows are XLA's in any case. config: the kernel's, instead of
        the one chosen for the shape.

    Returns:
      [T, out] in x's dtype.
    """

    def together(rows: Any, shared: Any) -> Array:
        (x, residual), (weight, bias, norm) = rows, shared
        return _of_rows(x, weight, bias, norm, gate, residual, implementation, config)

    return by_rows(together, (x, residual), (weight, bias, norm))


def _of_rows(
    x: Array,
    weight: Array,
    bias: Array | None,
    norm: Norm | None,
    gate: Gate | None,
    residual: Array | None,
    implementation: Implementation,
    config: Config | None,
) -> Array:
    """`fused_linear` of rows that are all there are."""
    out = weight.shape[0] // (2 if gate else 1)
    shape = {"rows": power_of_two(x.shape[0]), "inputs": x.shape[1], "outputs": out, "halves": 1 + (gate is not None)}
    default = config or Config.suited_to(out, x.shape[1])
    implementation, chosen = choose(implementation, "fused_linear", weight.dtype, shape, default)
    if implementation == "xla" or x.shape[0] > MOST_ROWS:
        return xla.fused_linear(x, weight, bias, norm, gate, residual)
    interpret = implementation == "interpret"
    return triton.fused_linear(x, weight, bias, norm, gate, residual, config=chosen, interpret=interpret)
