"""Flags that several evaluations share."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eval import measure, output
from frspec_jax import api, compile_cache
from frspec_jax.api import Generator
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import TreeConfig
from frspec_jax.errors import UserError
from frspec_jax.generate import tree_of

COPYING = {"off": (False,), "on": (True,), "both": (False, True)}


def add_model_arguments(
    parser: argparse.ArgumentParser, vocabularies: str, required: bool = True, dtype: str | None = None
) -> None:
    """The flags of a checkpoint, its drafts and their trees. dtype: the default; None is what suits the device."""
    parser.add_argument("--ckpt", type=Path, required=required, help="checkpoint folder")
    parser.add_argument(
        "--draft", metavar="NAME,...", help="names or folders of drafts to measure (default: the only one there is)"
    )
    parser.add_argument(
        "--draft-vocab", default=vocabularies, metavar="N,N,...",
        help=f"sub-vocabularies to measure: numbers, full, or shares such as 1/4 (default: {vocabularies})",
    )  # fmt: skip
    parser.add_argument(
        "--tree-size", type=int, metavar="N", help="nodes of the draft tree (default: what suits the device)"
    )
    parser.add_argument("--depth", type=int, metavar="D", help="levels below the root")
    parser.add_argument("--draft-top-k", type=int, metavar="K", help="beams a level and children a node")
    parser.add_argument(
        "--copying", choices=COPYING, default="off",
        help="EAGLE-2 drafts also propose what followed the same tokens earlier in the text; both: each method without "
        "it and with it (default: off)",
    )  # fmt: skip
    add_dtype_argument(parser, dtype)


def add_dtype_argument(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default=default,
        help=f"default: {default or 'bfloat16 on a GPU and on a CPU with AMX, else float32'}",
    )


def add_question_arguments(parser: argparse.ArgumentParser, questions: int | None, tokens: int) -> None:
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder or file of Spec-Bench and HumanEval (default: a small sample)"
    )
    parser.add_argument(
        "--questions", type=int, default=questions, metavar="N",
        help=f"evenly over the tasks (default: {'all' if questions is None else questions})",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=int, default=tokens, metavar="N", help=f"of an answer (default: {tokens})"
    )


def add_ranking_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranking", nargs="+", type=Path, default=[], metavar="FILE",
        help="take sub-vocabularies from each of these .npz files (default: the checkpoint's ranking)",
    )  # fmt: skip


def progress_bar() -> Progress:
    """A bar on standard error, with counts and times."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=output.file_of("--json"), metavar="FILE", help="write the figures here too")


def add_out_argument(parser: argparse._ActionsContainer, text: str, required: bool = False) -> None:
    """The folder of what is drawn."""
    parser.add_argument("--out", type=output.folder_of("--out"), required=required, metavar="FOLDER", help=text)


def models(
    args: argparse.Namespace, rankings: Sequence[Path] = (), context: int | None = None
) -> tuple[Checkpoint, dict[str, Generator]]:
    """The checkpoint, and vanilla and the drafting methods that the flags ask for."""
    compile_cache.enable()
    checkpoint = Checkpoint.open(args.ckpt)
    drafts = args.draft.split(",") if args.draft else [None]
    if any(checkpoint.draft_folder(draft) is None for draft in drafts):
        raise UserError(f"{args.ckpt} holds no draft to measure; add one with python -m train eagle or convert eagle")
    dtype = args.dtype and jnp.dtype(args.dtype)
    tree: TreeConfig = tree_of(args, api.preferred_tree(checkpoint, drafts[0], dtype))
    if tree.size == 1:
        raise UserError("--tree-size 1 drafts nothing; vanilla decoding is measured anyhow, so ask for 2 or more")
    sizes = sizes_of(args.draft_vocab, checkpoint.config.vocab_size)
    return checkpoint, measure.methods(
        checkpoint, drafts, sizes, tree, rankings, COPYING[args.copying], dtype=dtype, context=context
    )


def sizes_of(text: str, vocab_size: int) -> list[int | str]:
    """The sub-vocabularies that --draft-vocab lists: numbers of tokens, or "full"."""
    return [_size(part.strip(), vocab_size) for part in text.split(",")]


def _size(text: str, vocab_size: int) -> int | str:
    if text == "full":
        return text
    share = text.removeprefix("1/")
    if not share.isdecimal() or int(share) < 1:
        raise UserError(f"--draft-vocab {text}: give numbers of tokens, full, or shares such as 1/4")
    return vocab_size // int(share) if text.startswith("1/") else int(share)


def _command() -> str:
    """The command line, for a reader elsewhere: of a path that is absolute only the name."""
    program = Path(sys.argv[0])
    start = "python -m eval" if program.name == "__main__.py" else f"python {program.parent.name}/{program.name}"
    return " ".join([start, *(Path(a).name if a.startswith("/") else a for a in sys.argv[1:])])


def save(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures as JSON, with the machine, the versions, the date and the command that they were measured with."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"machine": measure.machine(), "versions": measure.versions()}
        about |= {"date": datetime.date.today().isoformat(), "command": _command()}
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(about | figures, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}; name another file") from None
