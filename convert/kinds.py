"""Which kind of draft a folder holds: told in one place, so that no two commands can send to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convert.folder import TensorFolder

SPECULATORS_KIND = "speculators_model_type"  # what kind of draft it is, in a config.json of speculators


def plain_name(name: str) -> str:
    """A tensor's name without the `model.` that some engines put before it."""
    return name.removeprefix("model.")


def draft_kind(source: TensorFolder) -> str | None:
    """Either "eagle3" or "eagle" (EAGLE, EAGLE-2, HASS), by what config.json and the tensors say; None: neither."""
    names = {plain_name(name) for name in source.names()}
    marks = {"d2t", "layers.0.hidden_norm.weight"}
    if (
        source.config.get(SPECULATORS_KIND) == "eagle3"
        or marks & names
        or any(n.startswith("midlayer.") for n in names)
    ):
        return "eagle3"
    return "eagle" if "fc.weight" in names else None
