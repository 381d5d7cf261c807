"""FR-Spec in JAX: speculative decoding that drafts from the most frequent tokens, and changes nothing else.

`load` a checkpoint folder, then `generate` or `stream`; see `frspec_jax.api`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frspec_jax.api import Draft, Generator, Request, Result, Text, load
    from frspec_jax.config import Sampling, TreeConfig
    from frspec_jax.errors import UserError

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("Draft", "Generator", "Request", "Result", "Text", "load"), "frspec_jax.api"),
    **dict.fromkeys(("Sampling", "TreeConfig"), "frspec_jax.config"),
    "UserError": "frspec_jax.errors",
}
__all__ = ["Draft", "Generator", "Request", "Result", "Sampling", "Text", "TreeConfig", "UserError", "load"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a command's --help need not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
