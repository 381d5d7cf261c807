"""`python -m convert hf FOLDER --out CKPT`: a model in Hugging Face's format.

Weights come from safetensors or `.bin`, in one file or in shards. The tokenizer's files are copied
as they are; where only SentencePiece's tokenizer.model is there, they are built from it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.folder import TensorFolder, read_json
from convert.gguf_tokenizer import save_tokenizer
from convert.kinds import draft_kind
from convert.progress import tensor_progress
from convert.spm import SentencePieceFile
from convert.weights import DTYPES, fill, model_parts, tensor_count
from frspec_jax.checkpoint import write_model
from frspec_jax.config import ModelConfig
from frspec_jax.errors import UserError
from frspec_jax.families import read_config
from frspec_jax.files import new_folder
from frspec_jax.shapes import model_shapes

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="FOLDER", help="the model's folder, with its config.json")
    parser.add_argument("--out", type=Path, required=True, metavar="CKPT", help="the checkpoint folder to write")
    add_dtype(parser)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="dtype of the stored weights; auto: bfloat16 stays, all else becomes float32 (default: auto)",
    )


def run(args: argparse.Namespace) -> None:
    folder = model_folder(args.source)
    source = TensorFolder(folder)
    if kind := draft_kind(source):
        raise UserError(f"{folder} is an EAGLE draft; run: python -m convert {kind} {folder} --target CKPT --name NAME")
    config = read_config(source.config, f"{folder / 'config.json'}")
    source, left_out = text_half(source)
    shapes, parts = model_shapes(config), model_parts(config)
    dtype = source.lossless_dtype if args.dtype == "auto" else DTYPES[args.dtype]
    with new_folder(args.out) as out:
        copy_tokenizer(folder, out)
        copy_generation_config(folder, source.config, out)
        with tensor_progress(tensor_count(shapes, parts)) as progress:
            params = fill(shapes, parts, source, dtype, lambda name: _leftover(name, config, source), progress)
        note_larger_tokenizer(out, config)
        write_model(out, config, params)
        about = {"format": "huggingface", "folder": folder.resolve().name}
        (out / "source.json").write_text(json.dumps(about) + "\n")
    print(
        f"wrote {args.out}: {config.architecture}, {config.num_layers} layers, "
        f"vocabulary {config.vocab_size:,}, {np.dtype(dtype).name}"
    )
    if left_out:
        print(f"left out, since it is not the text half: {', '.join(left_out)}")


def text_half(source: TensorFolder) -> tuple[TensorFolder, list[str]]:
    """The tensors of a multimodal model's text half under the names that they have by themselves.

    Also what the other half consists of, by name; of a model of text alone: all tensors, and nothing.
    """
    if not isinstance(source.config.get("text_config"), Mapping):
        return source, []

    def name_of(name: str) -> str:
        for prefix, mine in (("language_model.model.", "model."), ("model.language_model.", "model.")):
            if name.startswith(prefix):
                return mine + name.removeprefix(prefix)
        return name.removeprefix("language_model.")

    renamed = source.renamed(name_of)
    others = [
        name for name in renamed.names() if not name.startswith(("model.embed", "model.layers", "model.norm", HEAD))
    ]
    return renamed.without(others), sorted({name.removeprefix("model.").split(".")[0] for name in others})


def model_folder(path: Path) -> Path:
    """`path`, if it is a folder of a model; otherwise one sentence on what to give instead."""
    if path.suffix == ".gguf":
        raise UserError(f"{path} is a GGUF file; run: python -m convert gguf {path} --out CKPT")
    if not path.is_dir():
        raise UserError(
            f"{path} is no folder; download a model of the Hub first: hf download {path} --local-dir {path.name}"
        )
    if (path / "snapshots").is_dir():
        return of_hub_cache(path)
    if (path / "params").is_dir():
        raise UserError(f"{path} is a folder that python -m convert has written; give it to --ckpt as it is")
    return path


def of_hub_cache(path: Path) -> Path:
    """The folder of a model in the Hub's cache, models--OWNER--NAME: the snapshot that its main branch points to.

    Raises:
      UserError: there is no such snapshot, but none or several others.
    """
    main = path / "refs" / "main"
    if main.is_file() and (path / "snapshots" / main.read_text().strip()).is_dir():
        return path / "snapshots" / main.read_text().strip()
    snapshots = [folder for folder in sorted((path / "snapshots").iterdir()) if folder.is_dir()]
    if len(snapshots) != 1:
        raise UserError(f"{path} holds {len(snapshots)} snapshots of a model; give one of them: {path}/snapshots/NAME")
    return snapshots[0]


def _leftover(name: str, config: ModelConfig, source: TensorFolder) -> bool:
    """Whether a tensor that no parameter takes may be there all the same."""
    if name.endswith("rotary_emb.inv_freq"):  # a buffer that transformers once saved; it follows from the config
        return True
    if name != HEAD or not config.tied_head or EMBEDDING not in source.names():
        return False
    if not np.array_equal(source.read(HEAD), source.read(EMBEDDING)):
        raise UserError(
            f"{source.label}: config.json ties the head to the embedding, but {HEAD} differs from it; "
            "set tie_word_embeddings to false there if the model has a head of its own"
        )
    return True


def copy_tokenizer(folder: Path, out: Path) -> None:
    """Copy the tokenizer's files, or build them out of a SentencePiece tokenizer.model.

    Raises:
      UserError: there is neither, or the latter cannot be converted.
    """
    if (folder / TOKENIZER_FILES[0]).is_file():
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
        return
    if not (folder / "tokenizer.model").is_file():
        raise UserError(f"{folder} holds no tokenizer.json; download it along with the weights")
    save_tokenizer(out, SentencePieceFile(folder))
    if (folder / "chat_template.jinja").is_file():
        shutil.copyfile(folder / "chat_template.jinja", out / "chat_template.jinja")


def copy_generation_config(folder: Path, hf: Mapping[str, Any], out: Path) -> None:
    """Copy generation_config.json, or make one of the ends that config.json names."""
    if (folder / "generation_config.json").is_file():
        data = read_json(folder, "generation_config.json")
    else:
        data = {key: hf[key] for key in ("bos_token_id", "eos_token_id") if hf.get(key) is not None}
    (out / "generation_config.json").write_text(json.dumps(data, indent=2) + "\n")


def note_larger_tokenizer(out: Path, config: ModelConfig) -> None:
    """Say so when the tokenizer has ids that the model has no embedding for."""
    from tokenizers import Tokenizer

    try:
        highest = max(Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(with_added_tokens=True).values())
    except Exception as error:  # the package raises plain Exception for a file that it cannot read
        raise UserError(f"tokenizer.json cannot be read ({error}); download it again") from None
    if highest >= config.vocab_size:
        print(
            f"note: the tokenizer knows ids up to {highest}, the model only those below {config.vocab_size}; "
            "a text that uses the ids above cannot be answered",
            file=sys.stderr,
        )
