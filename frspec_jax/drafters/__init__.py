"""What proposes. Each drafter is one file, and a line of `KINDS`; the engine knows no more than `base.Drafter`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from frspec_jax.drafters.base import DraftSpec
from frspec_jax.errors import UserError

# The kind that a draft's config.json names, and the class that reads the rest of it. Imported when it is called for.
KINDS = {
    "eagle": ("frspec_jax.drafters.eagle", "EagleConfig"),
    "eagle3": ("frspec_jax.drafters.eagle3", "Eagle3Config"),
    "medusa": ("frspec_jax.drafters.medusa", "MedusaConfig"),
}


def spec_class(kind: str) -> type[DraftSpec]:
    """The class that describes drafts of a kind, one of `KINDS`."""
    module, name = KINDS[kind]
    return getattr(importlib.import_module(module), name)


def spec_of(data: Mapping[str, Any], file: str) -> DraftSpec:
    """The draft that a config.json describes; "eagle" where it names no kind.

    Raises:
      UserError: an unknown kind, or entries that are missing or make no sense.
    """
    kind = data.get("kind", "eagle")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{file}: a draft of kind {kind!r} is not known; known are {', '.join(KINDS)}")
    try:
        return spec_class(kind).from_json(data)
    except (ValueError, UserError) as error:
        raise UserError(f"{file} is damaged ({error}); convert the draft again") from None
