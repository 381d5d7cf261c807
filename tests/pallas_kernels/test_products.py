"""Products with float32 sums and rows of a table: right for any number of them, in either dtype, also under vmap."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.products import FEW_ROWS, linear, mean_square, rows_f32, take_rows, turned

pytestmark = pytest.mark.as_shipped
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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_a_table_are_its_own_bits(dtype):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(30, 8)), dtype).at[3].set(jnp.nan).at[4].set(-0.0)
    ids = jnp.array([[3, 29, 0], [4, 4, 17]])
    for found in (jax.jit(take_rows)(table, ids), jax.vmap(take_rows, in_axes=(None, 0))(table, ids)):
        assert found.dtype == dtype and found.tobytes() == table[ids].tobytes()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_gradients_are_products_in_the_same_dtype(rows, dtype):
    """With respect to the rows and the weight, of what is rounded to the dtype as it comes in."""
    x, weight = operands(dtype, rows, 96)
    by = np.random.default_rng(1).normal(size=(rows, 48)).astype(np.float32)
    found = jax.jit(jax.grad(lambda x, w: (rows_f32(x, w) * by).sum(), argnums=(0, 1)))(x, weight)
    by = np.asarray(jnp.asarray(by, dtype), np.float64)
    expected = by @ np.asarray(weight, np.float64), by.T @ np.asarray(x, np.float64)
    for mine, right in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(mine, np.float64), right, rtol=2**-8 if dtype == jnp.bfloat16 else 1e-5, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_turned_is_the_transposed(dtype):
    x, _ = operands(dtype, 7, 9)
    assert np.array_equal(jax.jit(turned)(x), np.asarray(x).T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_linear_is_a_product_and_a_bias_in_the_rows_dtype(rows, dtype):
    x, weight = operands(dtype, rows, 96)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=48), dtype)
    for given in (None, bias):
        found = jax.jit(linear)(x, weight, given)
        assert found.dtype == dtype and found.shape == (rows, 48)
        expected = exact(x, weight) + (0 if given is None else np.asarray(given, np.float64))
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=2e-5 if dtype == jnp.float32 else 0.2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 96), (7, 96), (60, 576), (3, 2, 96)])
def test_the_mean_square_of_a_row_is_the_same_alone(shape, dtype):
    """Bit for bit in bfloat16: one token is normalised as a tree of many is."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    found = jax.jit(mean_square)(x)
    assert found.dtype == jnp.float32 and found.shape == (*shape[:-1], 1)
    expected = (np.asarray(x, np.float64) ** 2).mean(-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if dtype == jnp.bfloat16:
        assert np.array_equal(jax.jit(mean_square)(x[-1:]), found[-1:])
