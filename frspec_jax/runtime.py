"""How a model runs on this machine, whatever it is asked and whatever drafts."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from frspec_jax.errors import UserError
from frspec_jax.kv_cache import BLOCK
from frspec_jax.prefill import Chunks
from frspec_jax.sharding import AXIS
from pallas_kernels.dispatch import AUTO, Kernels


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Dtype, context, chunks, kernels and devices of a model."""

    dtype: Any  # of weights and caches
    context: int  # tokens of prompt and answer together, at most
    chunks: Chunks  # of a prompt
    kernels: Kernels = AUTO
    mesh: Mesh | None = None  # over whose devices the target is divided

    def __post_init__(self) -> None:
        short = self.chunks.short
        if not 1 <= short <= BLOCK or BLOCK % short:
            raise UserError(f"--chunk {short} must divide {BLOCK}: 1, 2, 4, ... or {BLOCK} prompt tokens a pass")

    @property
    def of_target(self) -> Kernels:
        """The kernels of the target, whose layers may be divided; a drafter carries its own."""
        return self.kernels if self.mesh is None else dataclasses.replace(self.kernels, axis=AXIS)
