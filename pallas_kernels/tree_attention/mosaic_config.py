"""How the kernel in Mosaic GPU divides its work, and where it can be had.

Apart from the kernel, so that a program that runs none does not import Mosaic GPU, which takes most of a second.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.device import current
from pallas_kernels.dispatch import check_positive, power_of_two
from pallas_kernels.tree_attention.triton import PROGRAMS

ROWS = 64  # of a product, as wgmma has it
WIDEST = 128  # columns of values a program: the sums of more do not fit the registers of a warpgroup
SHARED_MEMORY = 227 * 1024  # bytes that a program may have on an H100
SUPPORTED = jax.__version_info__ >= (0, 11)  # the interpreter of JAX 0.10 knows no product with a turned operand


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel divides its work.

    block_k: cache rows a step, 64 or 128. splits: shares of the cache, worked on side by side. stages: blocks that
    shared memory holds, at least 2: one is worked on while the others arrive.
    """

    backend: ClassVar[str] = "mosaic"  # as a table's row names it

    block_k: int = 64
    splits: int = 8
    stages: int = 3

    def __post_init__(self) -> None:
        check_positive(self)
        if self.block_k not in (64, 128) or self.stages < 2:
            raise ValueError(f"block_k {self.block_k} is not 64 or 128, or stages {self.stages} is less than 2")

    @classmethod
    def suited_to(cls, rows: int, kv_heads: int) -> Config:
        """A config for `rows` = T G rows a KV head, before anything is measured: enough programs to fill the device."""
        programs = kv_heads * -(-rows // ROWS)
        return cls(splits=min(16, power_of_two(-(-PROGRAMS // programs), least=1)))

    def shared_memory(self, head_dim: int) -> int:
        """Bytes that a program of the first kernel has for queries (twice), keys, values and weights."""
        columns = 2 * ROWS * head_dim + self.stages * self.block_k * (head_dim + min(head_dim, WIDEST))
        return 2 * (columns + ROWS * self.block_k) + 4096  # and what Mosaic itself needs


def available(interpret: bool) -> bool:
    """Whether the kernel can be had here at all: on Hopper, or interpreted."""
    return SUPPORTED and (interpret or current().capability == (9, 0))


def takes(q: Array, keys: Array, config: Config, interpret: bool) -> bool:
    """Whether the kernel can be had for these arrays: bfloat16, of a head width that fits."""
    head_dim = q.shape[2]
    fits = head_dim % 16 == 0 and (head_dim <= WIDEST or head_dim % WIDEST == 0)
    room = config.shared_memory(head_dim) <= SHARED_MEMORY and keys.shape[1] % config.block_k == 0
    return available(interpret) and fits and room and q.dtype == keys.dtype == jnp.bfloat16
