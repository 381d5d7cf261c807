"""A published draft's folder under one set of names: those of SafeAILab/EAGLE, whoever wrote it.

Others keep the same layers and call them otherwise. vLLM's re-uploads put `model.` before every name; its trainers
(speculators) and re-uploads call EAGLE-3's `midlayer` `layers.0`; and speculators' config.json has the layer's
entries in an object of their own. AngelSlim calls it `layers.0` too.
"""

from __future__ import annotations

from pathlib import Path

from convert.folder import WEIGHT_FILES, TensorFolder
from convert.hf import model_folder
from convert.kinds import HEAD_FILES, SPECULATORS_KIND, TITLES, draft_kind, plain_name
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.errors import UserError
from frspec_jax.schema import Entries

LAYER_KEY = "transformer_layer_config"  # the layer's entries in a config.json of speculators


def open_draft(path: Path, kind: str, target: Checkpoint) -> TensorFolder:
    """The folder of a published draft of `kind` ("eagle" or "eagle3"), its names and entries as their publishers'.

    Raises:
      UserError: it is no such folder, or holds a draft of another kind, whose command is named.
    """
    source = TensorFolder(model_folder(path), (*WEIGHT_FILES, *HEAD_FILES))
    found = draft_kind(source)
    if SPECULATORS_KIND in source.config or LAYER_KEY in source.config:
        source = _from_speculators(source)
    if found is not None and found != kind:
        raise UserError(
            f"{source.label} is {TITLES[found]}; run: python -m convert {found} {source.label} --target {target.path}"
        )
    return source.renamed(lambda name: _published_name(plain_name(name), kind))


def _published_name(name: str, kind: str) -> str:
    """A tensor's name in SafeAILab's words. Of EAGLE speculators calls `fc` fusion_fc, and the layer transformer."""
    if kind == "eagle3":
        return f"midlayer.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name
    name = name.replace("fusion_fc.", "fc.", 1) if name.startswith("fusion_fc.") else name
    return f"layers.0.{name.removeprefix('transformer.')}" if name.startswith("transformer.") else name


def from_speculators(source: TensorFolder) -> bool:
    """Whether a draft lies there as speculators writes it."""
    return SPECULATORS_KIND in source.config


def check_speculators(source: TensorFolder) -> None:
    """Refuse a draft of speculators that is of no type that can be read.

    Raises:
      UserError: the sentence, with the types that can.
    """
    kind = source.config.get(SPECULATORS_KIND)
    if kind not in ("eagle", "eagle3"):
        raise UserError(
            f"{source.label}/config.json: {SPECULATORS_KIND} is {kind!r}; of the drafts of speculators those of type "
            "eagle and eagle3 can be converted"
        )


def _from_speculators(source: TensorFolder) -> TensorFolder:
    """The same with the layer's entries beside the draft's own, under the names that SafeAILab gives them."""
    check_speculators(source)
    entries = Entries(source.config, f"{source.label}/config.json")
    layer = entries.inner(LAYER_KEY).data
    if not layer:
        raise entries.wrong(LAYER_KEY, "an object with named entries")
    config = {**source.config, **layer}
    if source.config[SPECULATORS_KIND] == "eagle":
        if entries.flag("layernorms"):
            raise UserError(f"{entries.file} asks for layernorms; an EAGLE draft without them can be converted")
        config["bias"] = entries.flag("fusion_bias")
    return source.described(config)
