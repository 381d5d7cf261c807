"""Keep compiled programs between runs: a command that compiled yesterday starts at once today."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "FRSPEC_JAX_CACHE"  # a folder, or "off"


def enable() -> None:
    """Let JAX keep what it compiles under ~/.cache/frspec-jax, or where FRSPEC_JAX_CACHE says.

    Commands call it, the library never does. JAX's own JAX_COMPILATION_CACHE_DIR goes first.
    """
    import jax

    wanted = os.environ.get(VARIABLE)
    if wanted == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", wanted or str(home / "frspec-jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
