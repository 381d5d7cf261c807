"""Products with float32 sums: right for any number of rows, in either dtype, alone and under vmap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.products import FEW_ROWS, rows_f32

ROWS = [1, 2, 3, FEW_ROWS, FEW_ROWS + 1, 60]


def operands(dtype, *shape, outputs=48):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=shape), rng.normal(size=(outputs, shape[-1]))
    return jnp.asarray(x, dtype), jnp.asarray(weight, dtype)


def exact(x, weight):
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows(rows, dtype):
    x, weight = operands(dtype, rows, 96)
    found = jax.jit(rows_f32)(x, weight)
    assert found.dtype == jnp.float32 and found.shape == (rows, 48)
    np.testing.assert_allclose(found, exact(x, weight), atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_under_vmap(rows, dtype, shared):
    """As many sequences decoded side by side do it, with one weight; and, for completeness, with a weight each."""
    x, weight = operands(dtype, 5, rows, 96)
    weights = weight if shared else jnp.stack([weight * (i + 1) for i in range(5)])
    found = jax.jit(jax.vmap(rows_f32, in_axes=(0, None if shared else 0)))(x, weights)
    for i in range(5):
        np.testing.assert_allclose(found[i], exact(x[i], weights if shared else weights[i]), atol=1e-4)
