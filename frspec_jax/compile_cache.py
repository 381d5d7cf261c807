"""Keep compiled programs between runs: what was compiled yesterday starts at once today."""

from __future__ import annotations

import os

from pallas_kernels.measured import cache_folder


def enable() -> None:
    """Let JAX keep what it compiles under ~/.cache/frspec-jax, or where FRSPEC_JAX_CACHE says; "off" is nowhere.

    Commands call it, and `load`. A folder that JAX has been given already, by JAX_COMPILATION_CACHE_DIR or in Python,
    stays.
    """
    import jax

    folder = cache_folder()
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values["jax_compilation_cache_dir"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
