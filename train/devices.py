"""A run over several devices, and over several hosts: batches are spread by row, all else is copied to each device.

XLA does the rest: a mean over rows that lie on many devices becomes an all-reduce. So a step is one
program and one function, whatever it runs on, and its figures differ by the order of summation alone.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from frspec_jax.errors import UserError
from pallas_kernels.products import einsum_f32

ROWS = "rows"  # the mesh's only axis: the rows of a batch


def meet(what: str) -> None:
    """Wait until all processes have come here. what: a name for the place."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def mesh_for(rows: int, accumulate: int = 1) -> Mesh:
    """All devices of all hosts in a line.

    Raises:
      UserError: `rows` of a batch, in `accumulate` parts, cannot be spread evenly.
    """
    devices = jax.device_count()
    if rows % (accumulate * devices):
        parts = f"{accumulate} parts (--accumulate) on each of " if accumulate > 1 else ""
        raise UserError(f"--rows {rows} cannot be split evenly into {parts}{devices} devices; give a multiple")
    return jax.make_mesh((devices,), (ROWS,), axis_types=(AxisType.Auto,))


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device."""
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any) -> Any:
        if mesh.is_multi_process:
            return jax.make_array_from_process_local_data(whole, np.asarray(leaf), np.shape(leaf))
        return jax.device_put(leaf, whole)

    return jax.tree.map(placed, tree)


def share(rows: int) -> slice:
    """The rows of a batch that this process brings."""
    mine = rows // jax.process_count()
    return slice(jax.process_index() * mine, (jax.process_index() + 1) * mine)


def spread(batch: Any, mesh: Mesh) -> Any:
    """A batch whose rows lie on the devices in turn. batch: arrays [rows of this process, ...] on the host."""
    by_row = NamedSharding(mesh, PartitionSpec(ROWS))
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(by_row, np.asarray(leaf)), batch)


def product_rate(dtype: Any, size: int = 2048) -> float:
    """Floating-point operations a second of one large matrix product on one device: what a step is held against."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: einsum_f32("ij,kj->ik", x, x))  # as the steps do it: the fast way on a CPU too
    jax.block_until_ready(product(a))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
