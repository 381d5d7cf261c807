"""Which kind of draft a folder holds: told in one place, so that no two commands can send to each other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convert.folder import TensorFolder

SPECULATORS_KIND = "speculators_model_type"  # what kind of draft it is, in a config.json of speculators
TITLES = {"eagle": "an EAGLE-2 draft", "eagle3": "an EAGLE-3 draft", "medusa": "a folder of Medusa heads"}

HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")  # of Medusa heads that lie there alone

# A Medusa head's tensor under a prefix: its number, and the rest.
MEDUSA_HEAD = re.compile(r"(?:^|\.)medusa_heads?\.(\d+)\.(?:medusa_layers\.)?(.+)")
PLAIN_MEDUSA_HEAD = re.compile(r"\d+\.\d+\.linear\.weight")


def plain_name(name: str) -> str:
    """A tensor's name without the `model.` that some engines put before it."""
    return name.removeprefix("model.")


def draft_kind(source: TensorFolder) -> str | None:
    """The kind, by what config.json and the tensors say: one of `TITLES` (HASS counts as eagle), or None.

    A whole model with Medusa heads inside counts as the model that it is.
    """
    names = {plain_name(name) for name in source.names()}
    said = source.config.get(SPECULATORS_KIND)
    marks = {"d2t", "layers.0.hidden_norm.weight"}
    if said == "eagle3" or marks & names or any(n.startswith("midlayer.") for n in names):
        return "eagle3"
    if said == "eagle" or {"fc.weight", "fusion_fc.weight"} & names:
        return "eagle"
    return "medusa" if has_medusa_heads(names) and "layers.0.mlp.up_proj.weight" not in names else None


def has_medusa_heads(names: Iterable[str]) -> bool:
    """Whether some of the tensors are Medusa heads', under any of their names."""
    return any(MEDUSA_HEAD.search(name) or PLAIN_MEDUSA_HEAD.fullmatch(name) for name in names)
