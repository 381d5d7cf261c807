"""Load a checkpoint, generate, stream: the Python side of `python -m frspec_jax.generate`.

model = frspec_jax.load("CKPT")
print(model.generate("Why is the sky blue?").text)
for piece in model.stream("Why is the sky blue?", Request(sampling=Sampling(0.7), seed=1)):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from frspec_jax import compile_cache, mesh_parts, pace_tables, sharding
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import ModelConfig
from frspec_jax.defaults import CONTEXT, defaults
from frspec_jax.drafters.base import Target
from frspec_jax.drafting import NO_DRAFT, Draft, assembled, draft_folder
from frspec_jax.errors import UserError
from frspec_jax.generator import Generator
from frspec_jax.llama import LlamaParams
from frspec_jax.prefill import Chunks
from frspec_jax.request import Prompt, Request, Result
from frspec_jax.runtime import Runtime
from frspec_jax.state import Weights
from frspec_jax.texts import Reading, Stream, Text
from pallas_kernels.dispatch import AUTO, Kernels

__all__ = [
    "NO_DRAFT",
    "Draft",
    "Generator",
    "Prompt",
    "Reading",
    "Request",
    "Result",
    "Runtime",
    "Stream",
    "Text",
    "load",
]
DTYPES = ("float32", "bfloat16")


def load(
    ckpt: str | Path | Checkpoint,
    draft: Draft | str | None = None,
    *,
    dtype: Any = None,
    context: int | None = None,
    chunk: int | None = None,
    kernels: Kernels = AUTO,
    target: LlamaParams | None = None,
    mesh: Mesh | None = None,
) -> Generator:
    """Open a checkpoint folder and make it ready to generate.

    What is compiled is kept between runs, in ~/.cache/frspec-jax (`compile_cache`).

    Args:
      draft: what drafts, and how; a name alone stands for `Draft(name)`, "none" for vanilla decoding, and None for the
        checkpoint's default draft, which is the first that it had.
      dtype: of weights and caches, float32 or bfloat16. chunk: prompt tokens a pass, always as many, a divisor of
        256. None stands for what suits the device (`defaults`): long chunks for long prompts, short ones for the rest.
      context: tokens that prompt and answer may take together (default: as many as the model was trained for, and at
        most 4096).
      kernels: implementations of attention and of the draft's head.
      target: the weights, if they are loaded already: several models may share them.
      mesh: over whose devices the target is divided (`sharding.mesh_of`), and an EAGLE draft where that pays; None: one
        device has all of it.

    Raises:
      UserError: with one sentence that says what to mend.
    """
    compile_cache.enable()
    checkpoint = ckpt if isinstance(ckpt, Checkpoint) else Checkpoint.open(ckpt)
    draft = draft if isinstance(draft, Draft) else Draft(draft)
    runtime = dataclasses.replace(runtime_of(checkpoint.config, dtype, context, chunk, kernels), mesh=mesh)
    draft_folder(checkpoint, draft)  # what is not there is refused before weights are read
    with jax.enable_x64(False):
        params = checkpoint.params(runtime.dtype, mesh) if target is None else target
        drafting, weights = assembled(checkpoint, Target(checkpoint.config, params), draft, kernels)
        drafter, weights = mesh_parts.draft_on(mesh, drafting.drafter, weights)
        drafting = dataclasses.replace(drafting, drafter=drafter)
    pace = drafting.pace
    tables = None if pace is None else pace_tables.tables_of(pace, drafting.tree, drafting.odds)
    tables = sharding.everywhere(tables, mesh)
    return Generator(checkpoint, drafting, Weights(params, weights, tables), runtime)


def runtime_of(
    config: ModelConfig, dtype: Any, context: int | None, chunk: int | None, kernels: Kernels = AUTO
) -> Runtime:
    """How a model runs: what is asked for, and else what suits the device."""
    if dtype is not None and jnp.dtype(dtype).name not in DTYPES:
        raise UserError(f"--dtype {dtype} must be one of {', '.join(DTYPES)}")
    compiled = next((how for how in ("pallas", "mosaic") if how in dataclasses.astuple(kernels)), None)
    if compiled and jax.default_backend() != "gpu":
        raise UserError(
            f"--kernels {compiled} needs a CUDA GPU, and JAX found {jax.default_backend()}; use auto, xla or interpret"
        )
    if context is not None and not 1 <= context <= config.max_context:
        raise UserError(
            f"--context {context} is out of range; the model was trained for 1 to {config.max_context} tokens"
        )
    best = defaults(dtype)
    return Runtime(
        dtype=best.dtype if dtype is None else jnp.dtype(dtype),
        context=context or min(config.max_context, CONTEXT),
        chunks=best.chunks if chunk is None else Chunks(chunk),
        kernels=kernels,
    )
