"""`python -m convert eagle FOLDER --target CKPT --name eagle`: a published EAGLE, EAGLE-2 or HASS draft.

The format of SafeAILab/EAGLE (`cnets1.py`): a Llama-style config.json, and pytorch_model.bin or
model.safetensors with `fc` and one decoder layer; HASS (arXiv 2408.15766) only trains it otherwise. What
the tensors say counts: a bias is there if its tensor is. The rotary embedding and the token embedding are
the target's. The names may have `model.` before them, or be those of speculators, vLLM's trainers (see published.py).

A head among the tensors must be the target's, whole or, with a `token_map` beside it (vLLM), those of its rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from convert import importing
from convert.folder import TensorFolder
from convert.importing import EMBEDDING, FC_BIAS_KEY
from convert.published import open_draft
from convert.weights import draft_parts
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.drafters.eagle import EagleConfig
from frspec_jax.errors import UserError
from frspec_jax.schema import Entries

HEAD, MAP = "lm_head.weight", "token_map"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    importing.add_arguments(parser, EagleConfig.kind)


def run(args: argparse.Namespace) -> None:
    target = importing.open_target(args)
    source = open_draft(args.source, EagleConfig.kind, target)
    spec = read_draft_config(source, target)
    parts = draft_parts(spec.layer_of(target.config))
    beside = {EMBEDDING, *check_head(source, target)}
    if source.config.get(FC_BIAS_KEY) is False:  # put there for SGLang, by `convert export`
        beside.add("fc.bias")
    importing.import_draft(args, source, target, spec, parts, ignore=beside.__contains__)
    if MAP in beside:
        print(f"note: its {MAP} names the ids that its head kept; --ranking {source.label}/model.safetensors reads it")


def check_head(source: TensorFolder, target: Checkpoint) -> tuple[str, ...]:
    """See that a head among the tensors is the target's, which the draft shares; the names of what belongs to it.

    Raises:
      UserError: it is another one, or the map of its rows names no ids of the target.
    """
    names = set(source.names())
    if HEAD not in names:
        return ()
    ours = importing.target_head(target)
    if MAP in names:
        ids = source.read_integers(MAP)
        if ids.ndim != 1 or not ids.size or ids.min() < 0 or ids.max() >= len(ours):
            raise UserError(
                f"{source.label}: {MAP} must name ids of --target, from 0 to {len(ours) - 1}; download the draft again"
            )
        ours = ours[ids]
    if differing := importing.differing_rows(source, target, HEAD, ours):
        raise UserError(
            f"{source.label}: {HEAD} differs from the head of --target {target.path} in {differing} of {len(ours)} "
            "rows; the draft belongs to another target, or has a head of its own, which EAGLE-2 drafts cannot have here"
        )
    return (HEAD, MAP) if MAP in names else (HEAD,)


def read_draft_config(source: TensorFolder, target: Checkpoint) -> EagleConfig:
    """The draft's sizes out of its config.json, and its biases out of its tensors.

    Raises:
      UserError: it is no EAGLE draft, or one for another target.
    """
    config, names, file = source.config, set(source.names()), f"{source.label}/config.json"
    if "fc.weight" not in names:
        raise UserError(f"{source.label} holds no fc.weight, so it is no EAGLE draft")
    sizes = importing.layer_sizes(source, target)
    if sizes["head_dim"] != target.config.head_dim:
        raise UserError(
            f"{file}: head_dim {sizes['head_dim']}, but that of --target {target.path}, whose rotary embedding "
            f"the draft shares, is {target.config.head_dim}; the draft belongs to another target"
        )
    spec = EagleConfig(
        **sizes,
        fc_bias=_has_fc_bias(source),
        attention_bias="layers.0.self_attn.q_proj.bias" in names,
    )
    _check_bias(config, spec, file)
    _note_rope(config, target, file)
    return spec


def _has_fc_bias(source: TensorFolder) -> bool:
    """Whether there is an fc.bias that is more than the zeros which `convert export` has put there for SGLang."""
    if "fc.bias" not in source.names():
        return False
    return source.config.get(FC_BIAS_KEY) is not False or bool(source.read("fc.bias").any())


def _check_bias(config: Mapping[str, Any], spec: EagleConfig, file: str) -> None:
    """EAGLE's training has written an fc.bias that its config denies, and its inference then leaves out."""
    if "bias" in config and bool(config["bias"]) != spec.fc_bias:
        has = "the checkpoint has an fc.bias" if spec.fc_bias else "the checkpoint has no fc.bias"
        raise UserError(
            f"{file} says bias: {json.dumps(config['bias'])}, but {has}; "
            f"write {json.dumps(spec.fc_bias)} there if the draft was trained so"
        )


def _note_rope(config: Mapping[str, Any], target: Checkpoint, file: str) -> None:
    entries = Entries(config, file)
    rope, own = entries.inner("rope_parameters"), target.config.rope_theta
    theta = entries.number("rope_theta", rope.number("rope_theta", own))
    if theta != own:
        print(
            f"note: {file} says rope_theta {theta:g}; the target's {target.config.rope_theta:g} is used, "
            "as FR-Spec does",
            file=sys.stderr,
        )
