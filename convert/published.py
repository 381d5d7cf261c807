"""A published draft's folder under one set of names: those of SafeAILab/EAGLE, whoever wrote it.

Others keep the same layers and call them otherwise. vLLM's re-uploads put `model.` before every name; its trainers
(speculators) and re-uploads call EAGLE-3's `midlayer` `layers.0`; and speculators' config.json has the layer's
entries in an object of their own.
"""

from __future__ import annotations

from pathlib import Path

from convert.folder import TensorFolder
from convert.hf import model_folder
from convert.kinds import SPECULATORS_KIND, draft_kind, plain_name
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.errors import UserError
from frspec_jax.schema import Entries

LAYER_KEY = "transformer_layer_config"  # the layer's entries in a config.json of speculators


def open_draft(path: Path, kind: str, target: Checkpoint) -> TensorFolder:
    """The folder of a published draft of `kind` ("eagle" or "eagle3"), its names and entries as their publishers'.

    Raises:
      UserError: it is no such folder, or holds a draft of another kind, whose command is named.
    """
    source = TensorFolder(model_folder(path))
    found = draft_kind(source)
    if SPECULATORS_KIND in source.config or LAYER_KEY in source.config:
        source = _from_speculators(source)
    if found is not None and found != kind:
        title = {"eagle": "EAGLE-2", "eagle3": "EAGLE-3"}[found]
        raise UserError(
            f"{source.label} is an {title} draft; run: python -m convert {found} {source.label} --target {target.path}"
        )
    block = "midlayer." if found == "eagle3" else "layers.0."

    def name_of(name: str) -> str:
        name = plain_name(name)
        return block + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name

    return source.renamed(name_of)


def from_speculators(source: TensorFolder) -> bool:
    """Whether a draft lies there as speculators writes it."""
    return SPECULATORS_KIND in source.config


def _from_speculators(source: TensorFolder) -> TensorFolder:
    """The same with the layer's entries beside the draft's own."""
    entries = Entries(source.config, f"{source.label}/config.json")
    kind = source.config.get(SPECULATORS_KIND)
    if kind != "eagle3":
        raise UserError(
            f"{entries.file}: {SPECULATORS_KIND} is {kind!r}; of the drafts of speculators those of type eagle3 can be "
            "converted"
        )
    layer = entries.inner(LAYER_KEY).data
    if not layer:
        raise entries.wrong(LAYER_KEY, "an object with named entries")
    return source.described({**source.config, **layer})
