"""What the importers of drafts share: flags, the target that a draft belongs to, and the writing of its folder."""

from __future__ import annotations

import argparse
import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.folder import TensorFolder
from convert.hf import add_dtype
from convert.progress import tensor_progress
from convert.weights import DTYPES, fill, tensor_count
from frspec_jax import pace_tables
from frspec_jax.checkpoint import Checkpoint, check_draft_name, write_draft
from frspec_jax.config import check_layer
from frspec_jax.drafters.base import DraftSpec
from frspec_jax.errors import UserError
from frspec_jax.files import new_folder
from frspec_jax.locks import folder_lock
from frspec_jax.schema import Entries

EMBEDDING = "embed_tokens.weight"
TARGET_KEY = "frspec_target"  # our addition to config.json: the fingerprint of the draft's target
FC_BIAS_KEY = "frspec_fc_bias"  # another: whether the draft has an fc.bias, where the engine wants one or none
ROUNDING = 2.0**-7  # a row's relative error: bfloat16 rounding leaves 2^-9 at most, another model's row about 1
QUANTISED = 0.25  # the same where the target came out of a GGUF file, whose embedding may be of 4 bits


def add_arguments(parser: argparse.ArgumentParser, kind: str | None = None) -> None:
    """The flags of an importer of drafts of `kind`; None: of any, which is found out."""
    parser.add_argument("source", type=Path, metavar="FOLDER", help="the draft's folder, with its config.json")
    parser.add_argument("--target", type=Path, required=True, metavar="CKPT", help="checkpoint folder of its target")
    parser.add_argument(
        "--name", default=kind, help=f"the draft's name under CKPT/drafts (default: {kind or 'its kind'})"
    )
    add_dtype(parser)


def open_target(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint of --target, once --name is seen to be a name."""
    if args.name is not None:
        check_draft_name(args.name)
    return Checkpoint.open(args.target)


def layer_sizes(source: TensorFolder, target: Checkpoint) -> dict[str, Any]:
    """The sizes of a draft's decoder layer out of its config.json, under the names that our configs have for them.

    Raises:
      UserError: an entry is missing, there are several layers, the sizes cannot be a layer's, or the features are of
        another size than the target's.
    """
    config, file, wanted = source.config, f"{source.label}/config.json", target.config
    if config.get("num_hidden_layers", 1) != 1:
        raise UserError(f"{file}: a draft of {config['num_hidden_layers']} layers is not supported; EAGLE's has one")
    entries = Entries(config, file)
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{file}: hidden_act {config['hidden_act']!r} is not supported; such drafts use silu")
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and "sliding_attention" in kinds:
        raise UserError(f"{file}: layer_types asks for sliding_attention; a draft with full attention can be converted")
    hidden, heads = entries.whole("hidden_size"), entries.whole("num_attention_heads")
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": entries.whole("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": entries.whole("num_key_value_heads", heads),
        "head_dim": entries.whole("head_dim", max(1, hidden // heads)),
        "rms_norm_eps": entries.number("rms_norm_eps", 1e-6),
    }
    if entries.whole("target_hidden_size", hidden) == wanted.hidden_size != hidden:
        raise UserError(
            f"{file}: the draft has a hidden_size of {hidden}, and its target one of {wanted.hidden_size}; drafts that "
            "are as wide as their target can be converted"
        )
    if hidden != wanted.hidden_size:
        raise UserError(
            f"{file}: hidden_size {hidden}, but that of --target {target.path} is {wanted.hidden_size}; "
            "the draft belongs to another target"
        )
    check_layer(types.SimpleNamespace(**sizes), file=file)
    return sizes


def import_draft(
    args: argparse.Namespace,
    source: TensorFolder,
    target: Checkpoint,
    spec: DraftSpec,
    parts: dict[str, Any],
    ignore: Callable[[str], bool],
    given: Mapping[str, np.ndarray] | None = None,
    mend: str = "",
) -> None:
    """Fill CKPT/drafts/NAME out of a published draft; an embedding among the tensors must be the target's.

    Args:
      mend: what helps where it is not, besides the right target.
      parts: the tensors of each parameter, as in `weights.fill`. ignore: tells names that no parameter takes.
      given: parameters, by field, that are no tensors of the source.
    """
    given = given or {}
    if source.config.get(TARGET_KEY, target.fingerprint) != target.fingerprint:
        raise UserError(
            f"{source.label}/config.json: the draft was made for another target than --target {target.path}; "
            f"convert the weights that it was trained on, or take {TARGET_KEY} out of that file to try it on these"
        )
    odds = pace_tables.read_odds(args.source)
    shapes = spec.shapes(target.config).replace(**dict.fromkeys(given))
    dtype = source.lossless_dtype if args.dtype == "auto" else DTYPES[args.dtype]
    out = args.target / "drafts" / args.name
    with folder_lock(args.target, f"--target {args.target}"), new_folder(out, "--name") as part:
        with tensor_progress(tensor_count(shapes, parts)) as progress:
            params = fill(shapes, parts, source, dtype, ignore, progress).replace(**given)
        if EMBEDDING in source.names() and "embedding" not in parts:
            check_embedding(source, target, mend)
        facts = source.config.get("about")  # what `convert export` wrote, if it was that
        known = facts if isinstance(facts, dict) else {}
        about = {**known, "source": spec.kind, "folder": args.source.resolve().name}
        write_draft(part, spec, params, target.fingerprint, about)
        if odds is not pace_tables.DEFAULT:
            pace_tables.write_odds(part, odds)
    print(f"wrote {out}: a draft of kind {spec.kind}, {np.dtype(dtype).name}; its target is {args.target}")


def check_embedding(source: TensorFolder, target: Checkpoint, mend: str = "") -> None:
    """Compare the draft's copy of the embedding with the target's, which is the one in use.

    mend: what helps a draft of this kind besides.

    Raises:
      UserError: they differ by more than rounding, so the draft belongs to another target.
    """
    if differing := differing_rows(source, target):
        raise UserError(
            f"{source.label}: {EMBEDDING} differs from the embedding of --target {target.path} in {differing} of "
            f"{target.config.vocab_size} rows; the draft belongs to another target{mend}"
        )


def differing_rows(
    source: TensorFolder, target: Checkpoint, name: str = EMBEDDING, ours: np.ndarray | None = None
) -> int:
    """How many rows of one of the draft's tensors differ from the target's by more than rounding.

    name: the tensor; its embedding, or a head. ours: what it is held against; None: the target's embedding [V, H].

    Raises:
      UserError: it is of another shape, so the draft belongs to another target.
    """
    what = "embedding" if ours is None else "head"
    ours = target_embedding(target) if ours is None else ours
    wanted = ours.shape
    if source.shape(name) != wanted:
        raise UserError(
            f"{source.label}: {name} has shape {list(source.shape(name))}, the {what} of --target "
            f"{target.path} {list(wanted)}; the draft belongs to another target"
        )
    theirs = source.read(name)
    limit = QUANTISED if _came_from_gguf(target) else ROUNDING
    errors, sizes = [], []
    for start in range(0, wanted[0], 4096):  # in blocks, since in float32 a large table would fill the memory
        a = theirs[start : start + 4096].astype(np.float32)
        b = ours[start : start + 4096].astype(np.float32)
        errors.append(np.linalg.norm(a - b, axis=1))
        sizes.append(np.linalg.norm(b, axis=1))
    error, size = np.concatenate(errors), np.concatenate(sizes)
    # Rows of tokens that never occurred can be tiny, and float16 loses them: they count against the usual row.
    return int((error > limit * size + 1e-3 * np.median(size)).sum())


def target_embedding(target: Checkpoint) -> np.ndarray:
    """The target's embedding [V, H] in its stored dtype, without reading the other weights."""
    return _target_array(target, "embedding")


def target_head(target: Checkpoint) -> np.ndarray:
    """The same of its head [V, H], which may be the embedding."""
    return _target_array(target, "embedding" if target.config.tied_head else "lm_head")


def _target_array(target: Checkpoint, field: str) -> np.ndarray:
    import orbax.checkpoint as ocp

    config = target.config
    item = {field: jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), np.float32)}
    as_numpy = {field: ocp.RestoreArgs(restore_type=np.ndarray)}
    request = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore((target.path / "params").resolve(), args=request)[field]


def _came_from_gguf(target: Checkpoint) -> bool:
    try:
        return json.loads((target.path / "source.json").read_text()).get("format") == "gguf"
    except (OSError, ValueError):
        return False
