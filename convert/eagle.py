"""`python -m convert eagle FOLDER --target CKPT --name eagle`: a published EAGLE or EAGLE-2 draft.

The format of SafeAILab/EAGLE (`cnets1.py`): a Llama-style config.json, and pytorch_model.bin or
model.safetensors with `fc` and one decoder layer. What the tensors say counts: a bias is there if its
tensor is. The rotary embedding and the token embedding are the target's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from convert import draft
from convert.draft import EMBEDDING, FC_BIAS_KEY
from convert.folder import TensorFolder
from convert.hf import model_folder
from convert.weights import draft_parts
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.drafters.eagle import EagleConfig
from frspec_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    draft.add_arguments(parser, EagleConfig.kind)


def run(args: argparse.Namespace) -> None:
    target = draft.open_target(args)
    source = TensorFolder(model_folder(args.source))
    spec = read_draft_config(source, target)
    parts = draft_parts(spec.layer_of(target.config))
    padding = {"fc.bias"} if source.config.get(FC_BIAS_KEY) is False else set()
    draft.import_draft(args, source, target, spec, parts, ignore=({EMBEDDING} | padding).__contains__)


def read_draft_config(source: TensorFolder, target: Checkpoint) -> EagleConfig:
    """The draft's sizes out of its config.json, and its biases out of its tensors.

    Raises:
      UserError: it is no EAGLE-2 draft, or one for another target.
    """
    config, names, file = source.config, set(source.names()), f"{source.label}/config.json"
    if "d2t" in names or any(name.startswith("midlayer.") for name in names):
        raise UserError(f"{source.label} is an EAGLE-3 draft; drafts of EAGLE and EAGLE-2 can be converted")
    if "fc.weight" not in names:
        raise UserError(f"{source.label} holds no fc.weight, so it is no EAGLE draft")
    if config.get("num_hidden_layers", 1) != 1:
        raise UserError(f"{file}: a draft of {config['num_hidden_layers']} layers is not supported; EAGLE's has one")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        spec = EagleConfig(
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            fc_bias=_has_fc_bias(source),
            attention_bias="layers.0.self_attn.q_proj.bias" in names,
        )
    except KeyError as missing:
        raise UserError(f"{file}: the entry {missing} is missing") from None
    wanted = target.config
    if hidden != wanted.hidden_size or spec.head_dim != wanted.head_dim:
        raise UserError(
            f"{file}: hidden_size {hidden} and head_dim {spec.head_dim}, but those of --target {target.path} "
            f"are {wanted.hidden_size} and {wanted.head_dim}; the draft belongs to another target"
        )
    _note_disagreements(config, spec, target, file)
    return spec


def _has_fc_bias(source: TensorFolder) -> bool:
    """Whether there is an fc.bias that is more than the zeros which `convert export` has put there for SGLang."""
    if "fc.bias" not in source.names():
        return False
    return source.config.get(FC_BIAS_KEY) is not False or bool(source.read("fc.bias").any())


def _note_disagreements(config: Mapping[str, Any], spec: EagleConfig, target: Checkpoint, file: str) -> None:
    if "bias" in config and bool(config["bias"]) != spec.fc_bias:
        what = "the checkpoint has an fc.bias, which is used" if spec.fc_bias else "the checkpoint has no fc.bias"
        print(f"note: {file} says bias: {json.dumps(config['bias'])}, but {what}", file=sys.stderr)
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or rope.get("rope_theta")
    if theta is not None and float(theta) != target.config.rope_theta:
        print(
            f"note: {file} says rope_theta {theta:g}; the target's {target.config.rope_theta:g} is used, "
            "as FR-Spec does",
            file=sys.stderr,
        )
