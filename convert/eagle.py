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
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from convert.folder import TensorFolder
from convert.hf import add_dtype, model_folder
from convert.progress import tensor_progress
from convert.weights import DTYPES, draft_parts, fill, tensor_count
from frspec_jax.checkpoint import Checkpoint, draft_shapes, new_folder, write_draft
from frspec_jax.config import DraftConfig
from frspec_jax.drafters.eagle import EagleParams
from frspec_jax.errors import UserError

EMBEDDING = "embed_tokens.weight"
TARGET_KEY = "frspec_target"  # our addition to config.json: the fingerprint of the draft's target
ROUNDING = 2.0**-7  # a row's relative error: bfloat16 rounding leaves 2^-9 at most, another model's row about 1
QUANTISED = 0.25  # the same where the target came out of a GGUF file, whose embedding may be of 4 bits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="FOLDER", help="the draft's folder, with its config.json")
    parser.add_argument("--target", type=Path, required=True, metavar="CKPT", help="checkpoint folder of its target")
    parser.add_argument("--name", default="eagle", help="the draft's name under CKPT/drafts (default: eagle)")
    add_dtype(parser)


def run(args: argparse.Namespace) -> None:
    if args.name != Path(args.name).name or args.name.startswith("."):
        raise UserError(f"--name {args.name} must be a plain name, without slashes or a leading dot")
    target = Checkpoint.open(args.target)
    folder = model_folder(args.source)
    source = TensorFolder(folder)
    draft = read_draft_config(source, target)
    shapes, parts = draft_shapes(draft, target.config), draft_parts(draft.layer_of(target.config))
    dtype = source.lossless_dtype if args.dtype == "auto" else DTYPES[args.dtype]
    out = args.target / "drafts" / args.name
    with new_folder(out, "--name") as part:
        with tensor_progress(tensor_count(shapes, parts)) as progress:
            params = fill(shapes, parts, source, dtype, EMBEDDING.__eq__, progress)
        if EMBEDDING in source.names():
            check_embedding(source, target)
        facts = source.config.get("about")  # what `export_eagle` wrote, if it was that
        about = {**(facts if isinstance(facts, dict) else {}), "source": "eagle", "folder": folder.resolve().name}
        write_draft(part, draft, params, target.fingerprint, about)
    print(f"wrote {out}: an EAGLE draft, {np.dtype(dtype).name}; its target is {args.target}")


def read_draft_config(source: TensorFolder, target: Checkpoint) -> DraftConfig:
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
    if config.get(TARGET_KEY, target.fingerprint) != target.fingerprint:
        raise UserError(f"{file}: the draft was made for another target than --target {target.path}")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        draft = DraftConfig(
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            fc_bias="fc.bias" in names,
            attention_bias="layers.0.self_attn.q_proj.bias" in names,
        )
    except KeyError as missing:
        raise UserError(f"{file}: the entry {missing} is missing") from None
    wanted = target.config
    if hidden != wanted.hidden_size or draft.head_dim != wanted.head_dim:
        raise UserError(
            f"{file}: hidden_size {hidden} and head_dim {draft.head_dim}, but those of --target {target.path} "
            f"are {wanted.hidden_size} and {wanted.head_dim}; the draft belongs to another target"
        )
    _note_disagreements(config, draft, target, file)
    return draft


def _note_disagreements(config: Mapping[str, Any], draft: DraftConfig, target: Checkpoint, file: str) -> None:
    if "bias" in config and bool(config["bias"]) != draft.fc_bias:
        what = "the checkpoint has an fc.bias, which is used" if draft.fc_bias else "the checkpoint has no fc.bias"
        print(f"note: {file} says bias: {json.dumps(config['bias'])}, but {what}", file=sys.stderr)
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or rope.get("rope_theta")
    if theta is not None and float(theta) != target.config.rope_theta:
        print(
            f"note: {file} says rope_theta {theta:g}; the target's {target.config.rope_theta:g} is used, "
            "as FR-Spec does",
            file=sys.stderr,
        )


def check_embedding(source: TensorFolder, target: Checkpoint) -> None:
    """Compare the draft's copy of the embedding with the target's, which is the one in use.

    Raises:
      UserError: they differ by more than rounding, so the draft belongs to another target.
    """
    config = target.config
    wanted = (config.vocab_size, config.hidden_size)
    if source.shape(EMBEDDING) != wanted:
        raise UserError(
            f"{source.label}: {EMBEDDING} has shape {list(source.shape(EMBEDDING))}, the embedding of --target "
            f"{target.path} {list(wanted)}; the draft belongs to another target"
        )
    theirs, ours = source.read(EMBEDDING), target_embedding(target)
    limit = QUANTISED if _came_from_gguf(target) else ROUNDING
    errors, sizes = [], []
    for start in range(0, wanted[0], 4096):  # in blocks, since in float32 a large table would fill the memory
        a = theirs[start : start + 4096].astype(np.float32)
        b = ours[start : start + 4096].astype(np.float32)
        errors.append(np.linalg.norm(a - b, axis=1))
        sizes.append(np.linalg.norm(b, axis=1))
    error, size = np.concatenate(errors), np.concatenate(sizes)
    # Rows of tokens that never occurred can be tiny, and float16 loses them: they count against the usual row.
    differing = int((error > limit * size + 1e-3 * np.median(size)).sum())
    if differing:
        raise UserError(
            f"{source.label}: {EMBEDDING} differs from the embedding of --target {target.path} in {differing} of "
            f"{wanted[0]} rows; the draft belongs to another target"
        )


def target_embedding(target: Checkpoint) -> np.ndarray:
    """The target's embedding [V, H] in its stored dtype, without reading the other weights."""
    import orbax.checkpoint as ocp

    config = target.config
    item = {"embedding": jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), np.float32)}
    as_numpy = {"embedding": ocp.RestoreArgs(restore_type=np.ndarray)}
    request = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore((target.path / "params").resolve(), args=request)["embedding"]


def _came_from_gguf(target: Checkpoint) -> bool:
    try:
        return json.loads((target.path / "source.json").read_text()).get("format") == "gguf"
    except (OSError, ValueError):
        return False


def export_eagle(
    folder: Path, draft: DraftConfig, params: EagleParams, target: Checkpoint, about: Mapping[str, Any]
) -> None:
    """Write a draft in the published format: config.json, and model.safetensors in bfloat16.

    The embedding is left out, since every reader takes the target's. Importing the folder again gives
    the same bfloat16 weights, bit for bit.

    Args:
      folder: of `new_folder`, or any empty one. about: facts for the reader (source, training).
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}

    def split(array: Any, parts: tuple[tuple[str, int], ...]) -> None:
        rows = np.asarray(array).astype(ml_dtypes.bfloat16)
        ends = np.cumsum([count for _, count in parts])
        for (name, _), piece in zip(parts, np.split(rows, ends[:-1]), strict=True):
            tensors[name] = np.ascontiguousarray(piece)

    parts = draft_parts(draft.layer_of(target.config))
    split(params.fc, parts["fc"])
    if params.fc_bias is not None:
        split(params.fc_bias, parts["fc_bias"])
    for field, names in parts["layer"].items():
        if getattr(params.layer, field) is not None:
            split(getattr(params.layer, field), names)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    family = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    config = {
        "architectures": [family[target.config.architecture]],
        "model_type": target.config.architecture,
        "num_hidden_layers": 1,
        "hidden_size": draft.hidden_size,
        "intermediate_size": draft.intermediate_size,
        "num_attention_heads": draft.num_heads,
        "num_key_value_heads": draft.num_kv_heads,
        "head_dim": draft.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": draft.rms_norm_eps,
        "rope_theta": target.config.rope_theta,
        "vocab_size": target.config.vocab_size,
        "max_position_embeddings": target.config.max_context,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bias": draft.fc_bias,
        "qkv_bias": draft.attention_bias,
        TARGET_KEY: target.fingerprint,
        "about": dict(about),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
