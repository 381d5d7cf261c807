"""`python -m convert eagle3 FOLDER --target CKPT --name eagle3`: a published EAGLE-3 draft.

The format of SafeAILab/EAGLE (`cnets.py`), which SGLang and vLLM read too: a Llama-style config.json, and
pytorch_model.bin or model.safetensors with `midlayer`, a head of its own, and `d2t` and `t2d`, which say
what the head's rows stand for. The rotary embedding's base is the draft's; the token embedding is the target's.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from convert import draft
from convert.draft import EMBEDDING
from convert.folder import TensorFolder
from convert.hf import model_folder
from convert.weights import layer_parts
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import ModelConfig, RopeScaling
from frspec_jax.drafters.eagle3 import Eagle3Config, default_taps
from frspec_jax.errors import UserError
from frspec_jax.schema import Entries

TAPS_KEY = "eagle_aux_hidden_state_layer_ids"
OTHER_MODELS_MAP = "the map belongs to a head that was trained for another vocabulary"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    draft.add_arguments(parser, Eagle3Config.kind)


def run(args: argparse.Namespace) -> None:
    target = draft.open_target(args)
    source = TensorFolder(model_folder(args.source))
    spec = read_draft_config(source, target)
    ids = read_ids(source, target.config.vocab_size, spec.draft_vocab_size)
    parts = eagle3_parts(spec, target.config)
    draft.import_draft(
        args, source, target, spec, parts, ignore={EMBEDDING, "d2t", "t2d"}.__contains__, given={"ids": ids}
    )


def eagle3_parts(spec: Eagle3Config, target: ModelConfig) -> dict[str, Any]:
    """The tensors of a published EAGLE-3 draft, in the structure of `Eagle3Params`; its ids are none of them."""
    hidden = spec.hidden_size
    return {
        "fc": (("fc.weight", hidden),),
        "fc_bias": (("fc.bias", hidden),),
        "embedding_norm": (("midlayer.input_layernorm.weight", hidden),),
        "feature_norm": (("midlayer.hidden_norm.weight", hidden),),
        "layer": layer_parts(spec.layer_of(target), "midlayer."),
        "norm": (("norm.weight", hidden),),
        "lm_head": (("lm_head.weight", spec.draft_vocab_size),),
        "ids": (),
    }


def read_draft_config(source: TensorFolder, target: Checkpoint) -> Eagle3Config:
    """The draft's sizes out of its config.json and its tensors.

    Raises:
      UserError: it is no EAGLE-3 draft, one for another target, or its config.json and its tensors disagree.
    """
    config, names, file = source.config, set(source.names()), f"{source.label}/config.json"
    if "fc.weight" in names and "layers.0.self_attn.q_proj.weight" in names:
        raise UserError(
            f"{source.label} is an EAGLE-2 draft; run: python -m convert eagle {source.label} --target {target.path}"
        )
    for name in ("fc.weight", "midlayer.self_attn.q_proj.weight", "lm_head.weight"):
        if name not in names:
            raise UserError(f"{source.label} holds no {name}, so it is no whole EAGLE-3 draft")
    entries = Entries(config, file)
    vocabulary = entries.whole("vocab_size", target.config.vocab_size)
    if vocabulary != target.config.vocab_size:
        raise UserError(
            f"{file}: vocab_size {vocabulary}, but that of --target {target.path} is {target.config.vocab_size}; "
            "the draft belongs to another target"
        )
    if bool(config.get("bias", False)) != ("fc.bias" in names):
        has = "an fc.bias" if "fc.bias" in names else "no fc.bias"
        raise UserError(
            f"{file} says bias: {str(bool(config.get('bias', False))).lower()}, but the checkpoint has {has}; "
            "set it to what the draft was trained with"
        )
    rope = entries.inner("rope_parameters", "rope_scaling")
    return Eagle3Config(
        **draft.layer_sizes(source, target),
        rope_theta=rope.number("rope_theta", entries.number("rope_theta", 10000.0)),
        rope_scaling=RopeScaling.from_hf(rope, entries.whole("max_position_embeddings", 2048)),
        draft_vocab_size=entries.whole("draft_vocab_size", source.shape("lm_head.weight")[0]),
        taps=_taps(source, target.config.num_layers),
        fc_bias="fc.bias" in names,
        attention_bias="midlayer.self_attn.q_proj.bias" in names,
    )


def _taps(source: TensorFolder, layers: int) -> tuple[int, ...]:
    """The target's layers whose inputs the draft reads: the published ones, which a config.json may only repeat.

    Engines number those of a config.json differently (by the layer that writes them or the one that reads
    them), so others than the published ones could be meant either way.
    """
    taps = default_taps(layers)
    if not 0 <= taps[2] <= layers:
        raise UserError(f"--target has {layers} layers; an EAGLE-3 draft reads the last but two, so it needs three")
    nested = source.config.get("eagle_config")
    stated = source.config.get(TAPS_KEY) or (nested.get(TAPS_KEY) if isinstance(nested, dict) else None)
    if stated is not None and not isinstance(stated, list):
        raise UserError(f"{source.label}/config.json: {TAPS_KEY} is {stated!r}, and must be a list of layers")
    if stated is not None and tuple(stated) not in (taps, tuple(tap - 1 for tap in taps)):
        raise UserError(
            f"{source.label}/config.json: {TAPS_KEY} {list(stated)} are not the published ones "
            f"({list(taps)} of --target); such drafts are not supported"
        )
    return taps


def read_ids(source: TensorFolder, vocab_size: int, draft_vocab_size: int) -> np.ndarray:
    """What the rows of the draft's head stand for, [V_d] int32: row i is id i + d2t[i].

    Raises:
      UserError: there is no map though one is needed, or the map cannot be the one that the head was trained with.
    """
    names, label, rows = set(source.names()), source.label, np.arange(draft_vocab_size)
    if "d2t" not in names:
        if draft_vocab_size != vocab_size:
            raise UserError(
                f"{label} holds no d2t, without which nobody knows what the {draft_vocab_size} rows of its head stand "
                "for; download the draft again, from where it was published"
            )
        return rows.astype(np.int32)
    offsets = source.read_integers("d2t")
    if offsets.shape != (draft_vocab_size,):
        raise UserError(f"{label}: d2t has shape {list(offsets.shape)}, and the head {draft_vocab_size} rows")
    ids = rows + offsets
    if draft_vocab_size != vocab_size and not offsets.any():
        raise UserError(
            f"{label}: d2t is all zeros, as it is before a map is filled in; download the draft again, or have it fixed"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise UserError(f"{label}: d2t names id {ids[(ids < 0) | (ids >= vocab_size)][0]}; {OTHER_MODELS_MAP}")
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise UserError(f"{label}: d2t names id {values[counts > 1][0]} more than once; {OTHER_MODELS_MAP}")
    if "t2d" in names:
        known = source.read_integers("t2d").astype(bool)
        if known.shape != (vocab_size,) or not np.array_equal(np.flatnonzero(known), values):
            raise UserError(f"{label}: t2d does not name the ids that d2t does; {OTHER_MODELS_MAP}")
    return ids.astype(np.int32)
