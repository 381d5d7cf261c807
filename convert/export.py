"""`python -m convert export --ckpt CKPT --draft NAME --format sglang --out FOLDER`: a draft for other engines.

Writes config.json and model.safetensors as the engine at hand reads them, without the embedding, which
all of them take from the target; `python -m convert eagle` (or medusa, eagle3) reads the folder back, bit for bit.

With --draft-vocab N the ranking goes along: freq_N.pt, the list of ids that SGLang's --speculative-token-map and
FR-Spec read (with --map as freq_N.json, .txt, .npy or .safetensors too), and vocabulary_map.safetensors, the same ids
as EAGLE-3's pair of maps, d2t and t2d.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.layouts import LAYOUTS
from convert.weights import DTYPES
from frspec_jax import pace_tables, token_maps
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.errors import UserError
from frspec_jax.files import new_folder
from frspec_jax.vocabulary import maps_of

FORMATS = tuple(dict.fromkeys(name for formats in LAYOUTS.values() for name in formats))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder of the target")
    parser.add_argument(
        "--draft",
        metavar="NAME",
        help="a draft's name or folder, or none: the ranking alone (default: the first that was there)",
    )
    parser.add_argument("--format", choices=FORMATS, help="whose layout (default: the one of the draft's publishers)")
    parser.add_argument(
        "--verifier",
        metavar="NAME",
        help="with --format speculators: the target, by the name or folder that vLLM shall load it from "
        "(default: the name of what CKPT was converted from)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the tensors (default: bfloat16)")
    parser.add_argument("--draft-vocab", metavar="N", help="write the N (or 1/4) most frequent ids too, in both forms")
    parser.add_argument(
        "--map",
        nargs="+",
        choices=token_maps.FORMS,
        metavar="FORM",
        help=f"with --draft-vocab: as which files, of {', '.join(token_maps.FORMS)} (default: pt, which needs torch)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to write")


def run(args: argparse.Namespace) -> None:
    from safetensors.numpy import save

    checkpoint = Checkpoint.open(args.ckpt)
    folder = None if args.draft == "none" else checkpoint.draft_folder(args.draft)
    if folder is None and (args.draft_vocab is None or args.draft != "none"):
        raise UserError(f"{args.ckpt} holds no draft to export; name one with --draft, or give none and --draft-vocab")
    if args.map and args.draft_vocab is None:
        raise UserError("--map writes the ids of a sub-vocabulary; say how many with --draft-vocab, or drop the flag")
    if args.verifier is not None and args.format != "speculators":
        raise UserError("--verifier stands in drafts of --format speculators alone; add that, or drop the flag")
    with new_folder(args.out) as out:
        if folder is not None:
            tensors, config = published(checkpoint, folder, args.format, DTYPES[args.dtype])
            # Not save_file, whose files only their owner may read: another account may serve them.
            (out / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
            config |= {"torch_dtype": args.dtype}
            if args.verifier is not None:
                config["speculators_config"]["verifier"]["name_or_path"] = args.verifier
            (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            if (odds := pace_tables.read_odds(folder)) is not pace_tables.DEFAULT:
                pace_tables.write_odds(out, odds)
        if args.draft_vocab is not None:
            write_vocabulary(out, checkpoint, args.draft_vocab, args.map or ["pt"])
    print(f"wrote {args.out}")


def published(
    checkpoint: Checkpoint, folder: Path, form: str | None, dtype: Any
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the config.json of a draft in a format; None is its publishers' own.

    Raises:
      UserError: there is no such format of this kind of draft, or the draft does not fit it.
    """
    spec, params = checkpoint.draft(folder)
    if (formats := LAYOUTS.get(spec.kind)) is None:
        raise UserError(f"--draft: a draft of kind {spec.kind} has no form that other engines read")
    layout = formats.get(form or next(iter(formats)))
    if layout is None:
        raise UserError(f"--format {form}: a draft of kind {spec.kind} can be written as {', '.join(formats)}")
    tensors, config = layout(spec, params, checkpoint, dtype)
    about = json.loads((folder / "config.json").read_text()).get("about", {})
    return tensors, config | {"about": about}


def write_vocabulary(out: Path, checkpoint: Checkpoint, size: int | str, forms: Sequence[str]) -> None:
    """The sub-vocabulary of `size` ids: as lists of ids, most frequent first, and as EAGLE-3's maps, ascending.

    forms: of the lists, among `token_maps.FORMS`.

    size: a number, or a share of the vocabulary such as "1/4".

    Raises:
      UserError: there is no ranking, the size is out of range, or torch is missing.
    """
    from safetensors.numpy import save

    from frspec_jax.drafting import Draft, draft_ids

    ids = draft_ids(checkpoint, Draft(vocab=size))
    for form in forms:
        token_maps.write_map(out / f"freq_{len(ids)}.{form}", ids)
    d2t, t2d = maps_of(np.sort(ids), checkpoint.config.vocab_size)
    (out / "vocabulary_map.safetensors").write_bytes(save({"d2t": d2t, "t2d": t2d}))
