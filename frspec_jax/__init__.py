"""FR-Spec in JAX: speculative decoding that drafts from the most frequent tokens, and changes nothing else.

model = frspec_jax.load("CKPT")
print(model.generate("Why is the sky blue?", max_new_tokens=64))

`load` opens a checkpoint folder as a `Generator`; its `generate` and `stream` answer. Beside them: `frspec_jax.batch`
for many texts at once, a step at a time; `frspec_jax.scheduler` for asyncio; and the command `frspec`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frspec_jax.api import Draft, Generator, Request, Result, Text, load
    from frspec_jax.checkpoint import Checkpoint
    from frspec_jax.config import Sampling, TreeConfig
    from frspec_jax.errors import UserError

__version__ = "0.1.0"

_HOMES = {
    **dict.fromkeys(("Draft", "Generator", "Request", "Result", "Text", "load"), "frspec_jax.api"),
    "Checkpoint": "frspec_jax.checkpoint",
    **dict.fromkeys(("Sampling", "TreeConfig"), "frspec_jax.config"),
    "UserError": "frspec_jax.errors",
}
__all__ = [
    "Checkpoint",
    "Draft",
    "Generator",
    "Request",
    "Result",
    "Sampling",
    "Text",
    "TreeConfig",
    "UserError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a command's --help need not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
