"""A product with norm, gate, bias and residual, against the formula in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.fused_linear import Config, Norm, fused_linear
from pallas_kernels.fused_linear.triton import MOST_ROWS

WAYS = ("xla", "interpret", "pallas") if jax.default_backend() == "gpu" else ("xla", "interpret")
CONFIG = Config(block_o=32, block_i=32)
both = pytest.mark.parametrize("how", WAYS)


def case(rows, inputs, outputs, gate, seed=0, dtype=np.float32):
    """x, weight, bias, norm weight, residual."""
    rng = np.random.default_rng(seed)
    wide = outputs * (1 if gate is None else 2)
    shapes = ((rows, inputs), (wide, inputs), (wide,), (inputs,), (rows, outputs))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def reference(x, weight, bias, norm, gate, residual):
    x, weight = (np.asarray(a, np.float64) for a in (x, weight))
    if norm is not None:
        x = (
            x
            / np.sqrt((x * x).mean(-1, keepdims=True) + norm.eps)
            * (np.asarray(norm.weight, np.float64) + norm.offset)
        )
    y = x @ weight.T + (0 if bias is None else np.asarray(bias, np.float64))
    if gate is not None:
        a, up = np.split(y, 2, axis=-1)
        tanh = np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))
        y = (a / (1 + np.exp(-a)) if gate == "silu" else a * (1 + tanh) / 2) * up
    return y + (0 if residual is None else np.asarray(residual, np.float64))


@both
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(1, 64, 48), (5, 100, 70), (60, 64, 128), (64, 96, 33)]),
    st.booleans(),
    st.sampled_from([None, 0.0, 1.0]),
    st.sampled_from([None, "silu", "gelu"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_it_is_the_formula(how, sizes, biased, offset, gate, added, seed):
    x, weight, bias, scale, residual = case(*sizes, gate, seed)
    given = (x, weight, bias if biased else None)
    norm = None if offset is None else Norm(scale, 1e-5, offset)
    residual = residual if added else None
    product = jax.jit(functools.partial(fused_linear, gate=gate, implementation=how, config=CONFIG))
    mine = product(*given, norm=norm, residual=residual)
    exact = reference(*given, norm, gate, residual)
    assert mine.dtype == jnp.float32 and np.abs(mine - exact).max() < 2e-6 * np.abs(exact).max()


@both
def test_bfloat16_sums_in_float32(how):
    x, weight, bias, scale, residual = case(9, 256, 40, "silu", dtype=jnp.bfloat16)
    norm = Norm(scale, 1e-5)
    mine = fused_linear(x, weight, bias, norm=norm, gate="silu", residual=residual, implementation=how, config=CONFIG)
    exact = reference(x, weight, bias, norm, "silu", residual)
    assert mine.dtype == jnp.bfloat16
    assert np.abs(np.asarray(mine, np.float64) - exact).max() < 2e-2 * np.abs(exact).max()


def test_many_rows_are_xlas():
    x, weight, *_ = case(MOST_ROWS + 1, 32, 16, None)
    program = jax.make_jaxpr(functools.partial(fused_linear, implementation="interpret"))
    assert "pallas_call" not in str(program(x, weight)) and "pallas_call" in str(program(x[1:], weight))


@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (14336, 4096), (576, 576), (40, 24)])
def test_the_default_blocks_divide_the_inputs_where_they_can(outputs, inputs):
    config = Config.suited_to(outputs, inputs)
    assert inputs % config.block_i == 0 or config.block_i == 16
