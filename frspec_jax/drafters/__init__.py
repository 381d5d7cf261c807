"""What proposes. Each drafter is one file, and a line of `KINDS`; the engine knows no more than `base.Drafter`.

Other packages bring kinds of their own as entry points of the group `ENTRY_POINTS`: the kind's name, and the class that
describes drafts of it (docs/drafters.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from frspec_jax.drafters.base import DraftSpec
from frspec_jax.errors import UserError

# The kind that a draft's config.json names, and the class that reads the rest of it. Imported when it is called for.
KINDS = {
    "eagle": ("frspec_jax.drafters.eagle", "EagleConfig"),
    "eagle3": ("frspec_jax.drafters.eagle3", "Eagle3Config"),
    "medusa": ("frspec_jax.drafters.medusa", "MedusaConfig"),
}
ENTRY_POINTS = "frspec_jax.drafters"


def known() -> tuple[str, ...]:
    """The kinds that there are: ours, then those of other packages that are installed."""
    return (*KINDS, *sorted({point.name for point in entry_points(group=ENTRY_POINTS)} - set(KINDS)))


def spec_class(kind: str) -> type[DraftSpec]:
    """The class that describes drafts of a kind, one of `known`; ours go before others' of the same name.

    Raises:
      UserError: there is no such kind, or the package that brings it cannot be imported.
    """
    if kind in KINDS:
        module, name = KINDS[kind]
        return getattr(importlib.import_module(module), name)
    found = tuple(entry_points(group=ENTRY_POINTS, name=kind))
    if not found:
        raise UserError(f"a draft of kind {kind!r} is not known; known are {', '.join(known())}")
    try:
        return found[0].load()
    except Exception as error:  # somebody else's module may raise anything as it is imported
        package = found[0].dist.name if found[0].dist is not None else found[0].value
        raise UserError(f"drafts of kind {kind} are those of {package}, which cannot be imported ({error})") from None


def spec_of(data: Mapping[str, Any], file: str) -> DraftSpec:
    """The draft that a config.json describes; "eagle" where it names no kind.

    Raises:
      UserError: an unknown kind, or entries that are missing or make no sense.
    """
    kind = data.get("kind", "eagle")
    if not isinstance(kind, str):
        raise UserError(f"{file}: a draft of kind {kind!r} is not known; known are {', '.join(known())}")
    try:
        found = spec_class(kind)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    try:
        return found.from_json(data)
    except (ValueError, UserError) as error:
        raise UserError(f"{file} is damaged ({error}); convert the draft again") from None
