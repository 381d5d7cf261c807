"""`python -m convert export --ckpt CKPT --draft NAME --out FOLDER`: a draft in the published EAGLE format.

Writes config.json and model.safetensors (bfloat16), without the embedding, which every reader takes
from the target. `python -m convert eagle` reads it back, bit for bit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from convert.eagle import export_eagle
from frspec_jax.checkpoint import Checkpoint, new_folder
from frspec_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder of the target")
    parser.add_argument("--draft", metavar="NAME", help="a draft's name or folder (default: the only one there is)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder to write")


def run(args: argparse.Namespace) -> None:
    checkpoint = Checkpoint.open(args.ckpt)
    folder = checkpoint.draft_folder(args.draft)
    if folder is None:
        raise UserError(f"{args.ckpt} holds no draft to export; name one with --draft")
    draft, params = checkpoint.draft(folder)
    about = json.loads((folder / "config.json").read_text()).get("about", {})
    with new_folder(args.out) as out:
        export_eagle(out, draft, params, checkpoint, about)
    print(f"wrote {args.out}")
