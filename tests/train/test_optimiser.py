"""The optimiser: gradients through the head's products, and Muon."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.optimiser import head_logits, orthogonalised
from train.recipe import Recipe


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_the_logits_of_a_head_have_their_gradients(dtype, tolerance):
    """With respect to the rows that it reads and to itself, as in float32, in the dtype of the products."""
    rng = np.random.default_rng(0)
    rows, head = jnp.asarray(rng.normal(size=(2, 5, 16)), dtype), jnp.asarray(rng.normal(size=(30, 16)), dtype)
    weights = jnp.asarray(rng.normal(size=(2, 5, 30)), jnp.float32)

    def plain(rows, head):
        return jnp.einsum("rth,mh->rtm", rows.astype(jnp.float32), head.astype(jnp.float32), precision="highest")

    np.testing.assert_allclose(head_logits(rows, head), plain(rows, head), atol=1e-5)
    expected = jax.grad(lambda x, h: (plain(x, h) * weights).sum(), argnums=(0, 1))(rows, head)
    mine = jax.jit(jax.grad(lambda x, h: (head_logits(x, h) * weights).sum(), argnums=(0, 1)))(rows, head)
    for found, right in zip(mine, expected, strict=True):
        assert found.dtype == dtype
        right = np.asarray(right.astype(jnp.float32))
        np.testing.assert_allclose(found.astype(jnp.float32), right, atol=tolerance * abs(right).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_makes_an_update_orthogonal(shape, dtype):
    """The singular vectors stay, the singular values come near one, and the update has the size of AdamW's."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = np.asarray(orthogonalised(jnp.asarray(x), jnp.dtype(dtype)), np.float64) / (0.2 * max(shape) ** 0.5)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    values = u.T @ found @ vt.T
    assert np.abs(values - np.diag(np.diag(values))).max() < (1e-4 if dtype == jnp.float32 else 0.05)
    assert np.diag(values).min() > 0.5 and np.diag(values).max() < 1.3


def test_muon_is_optaxs():
    """For a matrix, in float32, of one gradient: the momentum's debiasing only scales what is made orthogonal."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(12, 20)), jnp.float32), "n": jnp.ones(5)}
    grads = jax.tree.map(lambda x: 0.1 * x - 0.05, params)
    mine = Recipe(lr=1e-2, warmup=0, steps=10, decay="linear").transformation()
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            optax.linear_schedule(1e-2, 0.0, 10), weight_decay=0.0, adam_b1=0.9, adam_b2=0.95, consistent_rms=0.2
        ),
    )
    updates = [tx.update(grads, tx.init(params), params)[0]["w"] for tx in (mine, theirs)]
    np.testing.assert_allclose(*updates, rtol=1e-3, atol=1e-7)
