"""`python -m convert eagle3 FOLDER --target CKPT --name eagle3`: a published EAGLE-3 draft.

The format of SafeAILab/EAGLE (`cnets.py`), which SGLang and vLLM read too: a Llama-style config.json, and
pytorch_model.bin or model.safetensors with `midlayer`, a head of its own, and `d2t` and `t2d`, which say
what the head's rows stand for. The rotary embedding's base is the draft's; the token embedding is the target's.

And the format of speculators, vLLM's trainers: the same layer under other names (see published.py), which may read
other layers of the target, norm in further places, and have a token embedding that was trained. EAGLE-3.1 norms in
two of these places (`fc_norm`, `norm_output`), whoever trained it: speculators, SpecForge, AngelSlim.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from convert import importing
from convert.folder import TensorFolder
from convert.importing import EMBEDDING
from convert.published import from_speculators, open_draft
from convert.weights import layer_parts
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import ModelConfig, RopeScaling
from frspec_jax.drafters.eagle3 import Eagle3Config, Norms, default_taps
from frspec_jax.errors import UserError
from frspec_jax.schema import Entries

TAPS_KEY = "eagle_aux_hidden_state_layer_ids"
OUR_TAPS_KEY = "frspec_taps"  # our addition to config.json: the taps, numbered by the layer that reads them
TRAINED_EMBEDDING_KEY = "embed_requires_grad"
MEND = f', or, if it was trained with an embedding of its own, say "{TRAINED_EMBEDDING_KEY}": true in its config.json'
INJECTION_KEY = "eagle_aux_injection_mode"  # AngelSlim: how the taps come to the draft
OTHER_MODELS_MAP = "the map belongs to a head that was trained for another vocabulary"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    importing.add_arguments(parser, Eagle3Config.kind)


def run(args: argparse.Namespace) -> None:
    target = importing.open_target(args)
    source = open_draft(args.source, Eagle3Config.kind, target)
    spec = read_draft_config(source, target)
    ids = read_ids(source, target.config.vocab_size, spec.draft_vocab_size)
    folded = _tap_norms(spec)
    source = _folded(source, folded, spec)
    parts = eagle3_parts(spec, target.config)
    beside = {EMBEDDING, "d2t", "t2d", *folded}
    importing.import_draft(args, source, target, spec, parts, ignore=beside.__contains__, given={"ids": ids}, mend=MEND)


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
        **({"embedding": ((EMBEDDING, target.vocab_size),)} if spec.own_embedding else {}),
    }


def _tap_norms(spec: Eagle3Config) -> tuple[str, ...]:
    """The tensors of the norms between the taps and `fc`, in the order of the taps."""
    each = tuple(f"fc_norm.{i}.weight" for i in range(len(spec.taps)))
    return {"none": (), "joined": ("input_norm.weight",), "each": each}[spec.norms.taps]


def tap_norm_tensors(spec: Eagle3Config, dtype: Any) -> dict[str, np.ndarray]:
    """Those norms for a draft whose `fc` has taken their weights in: all ones."""
    names = _tap_norms(spec)
    return {name: np.ones(len(spec.taps) * spec.hidden_size // len(names), dtype) for name in names}


def _folded(source: TensorFolder, names: tuple[str, ...], spec: Eagle3Config) -> TensorFolder:
    """The draft with the weights of those norms multiplied into the columns of `fc` that read what they scale."""
    if not names:
        return source
    for name in names:
        wanted = len(spec.taps) * spec.hidden_size // len(names)
        if name not in source.names():
            raise UserError(f"{source.label} holds no {name}, though its config.json asks for it; download it again")
        if source.shape(name) != (wanted,):
            raise UserError(f"{source.label}: {name} has shape {list(source.shape(name))}, and must have [{wanted}]")
    scale = np.concatenate([source.read(name).astype(np.float32) for name in names])
    return source.changed("fc.weight", lambda weight: weight.astype(np.float32) * scale)


def read_draft_config(source: TensorFolder, target: Checkpoint) -> Eagle3Config:
    """The draft's sizes out of its config.json and its tensors.

    Raises:
      UserError: it is no EAGLE-3 draft, one for another target, or its config.json and its tensors disagree.
    """
    config, names, file = source.config, set(source.names()), f"{source.label}/config.json"
    for name in ("fc.weight", "midlayer.self_attn.q_proj.weight", "lm_head.weight"):
        if name not in names:
            raise UserError(f"{source.label} holds no {name}, so it is no whole EAGLE-3 draft")
    entries = Entries(config, file)
    if config.get(INJECTION_KEY, "fused_fc") != "fused_fc":
        raise UserError(
            f"{file}: {INJECTION_KEY} {config[INJECTION_KEY]!r} is not supported; a draft whose fc joins the target's "
            "layers (fused_fc) can be converted"
        )
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
        **importing.layer_sizes(source, target),
        rope_theta=rope.number("rope_theta", entries.number("rope_theta", 10000.0)),
        rope_scaling=RopeScaling.from_hf(rope, entries.whole("max_position_embeddings", 2048)),
        draft_vocab_size=entries.whole("draft_vocab_size", source.shape("lm_head.weight")[0]),
        taps=_taps(source, target.config.num_layers),
        fc_bias="fc.bias" in names,
        attention_bias="midlayer.self_attn.q_proj.bias" in names,
        norms=_norms(source, entries),
        own_embedding=_own_embedding(source, target),
    )


def _norms(source: TensorFolder, entries: Entries) -> Norms:
    """Where the draft norms. Of speculators' format readers take a missing entry differently, so there none may be.

    Raises:
      UserError: it is not said, or both norms before `fc` are asked for.
    """
    if from_speculators(source) and source.config.get("norm_before_residual") is None:
        raise UserError(
            f"{entries.file} does not say norm_before_residual; write true or false there, as the draft was trained"
        )
    joined = entries.flag("norm_before_fc")
    each = entries.flag("fc_norm") or entries.flag("use_aux_norm")  # SGLang's older name for it
    if joined and each:
        raise UserError(
            f"{entries.file} asks for norm_before_fc and fc_norm; a draft with one of them can be converted"
        )
    return Norms(
        residual=entries.flag("norm_before_residual"),
        taps="joined" if joined else "each" if each else "none",
        output=entries.flag("norm_output"),
    )


def _own_embedding(source: TensorFolder, target: Checkpoint) -> bool:
    """Whether the draft's embedding is its own: other than the target's, where it may have been trained."""
    may = from_speculators(source) or Entries(source.config, f"{source.label}/config.json").flag(TRAINED_EMBEDDING_KEY)
    if not may or EMBEDDING not in source.names():
        return False
    rows = importing.differing_rows(source, target)
    if rows:
        print(
            f"note: {source.label}: {EMBEDDING} differs from the target's in {rows:,} of {target.config.vocab_size:,} "
            "rows; the draft keeps its own",
            file=sys.stderr,
        )
    return bool(rows)


def _taps(source: TensorFolder, layers: int) -> tuple[int, ...]:
    """The target's layers whose inputs the draft reads.

    Engines number those of a config.json differently (by the layer that writes them or the one that reads them), so
    others than the published ones could be meant either way. Speculators' are of the layers that read them, as ours.
    """
    file = f"{source.label}/config.json"
    if (ours := source.config.get(OUR_TAPS_KEY)) is not None:
        return _in_range(ours, layers, f"{file}: {OUR_TAPS_KEY}")
    if from_speculators(source) and (said := source.config.get(TAPS_KEY)):
        return _in_range(said, layers, f"{file}: {TAPS_KEY}")
    taps = default_taps(layers)
    if not 0 <= taps[2] <= layers:
        raise UserError(f"--target has {layers} layers; an EAGLE-3 draft reads the last but two, so it needs three")
    nested = source.config.get("eagle_config")
    places = (source.config.get(key) for key in (TAPS_KEY, "aux_hidden_states_layer_ids"))  # the second: AngelSlim's
    inner = nested.get(TAPS_KEY) if isinstance(nested, dict) else None
    stated = next((one for one in (*places, inner) if one), None)
    if stated is not None and not isinstance(stated, list):
        raise UserError(f"{source.label}/config.json: {TAPS_KEY} is {stated!r}, and must be a list of layers")
    if stated is not None and tuple(stated) not in (taps, tuple(tap - 1 for tap in taps)):
        raise UserError(
            f"{source.label}/config.json: {TAPS_KEY} {list(stated)} are not the published ones "
            f"({list(taps)} of --target); such drafts are not supported"
        )
    return taps


def _in_range(taps: Any, layers: int, what: str) -> tuple[int, ...]:
    """Taps as a file says them, seen to be layers of the target."""
    if not isinstance(taps, list) or not taps or not all(type(tap) is int and 0 <= tap <= layers for tap in taps):
        raise UserError(f"{what} is {taps!r}, and must be a list of layers of --target, from 0 to {layers}")
    return tuple(taps)


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
